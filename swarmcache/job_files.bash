# What bash is told before a job script: from here on it can start no program but those that only
# read, write to no file, and end nothing. job_files.py explains; tests/test_job_files.py tries it.

exec 199>/dev/null
readonly __tell=$SWARMCACHE_TELL __cds_done=$SWARMCACHE_CDS_DONE
PATH=$SWARMCACHE_TOOLS PWD=$SWARMCACHE_CWD FUNCNEST=64 __cds=0 __stack=()
hash -r
ulimit -c 0 -t 20 -v 2097152

# --- what asks for files ---

__want() {
  local path=$1
  [[ $path == /* ]] || path=$PWD/$path
  printf 'file\0%s\0' "$path" >&"$__tell"
  printf '%s\n' "$path"
}

swarmcache() {
  case ${1-} in
    cf) shift; cf "$@"; return ;;
    get) shift ;;
    *) return 0 ;;
  esac
  while (($#)); do
    case $1 in
      --) shift; break ;;
      --timeout | --socket | --config) shift ;; # and its value
      -*) ;;
      *) __want "$1" ;;
    esac
    shift
  done
  while (($#)); do
    __want "$1"
    shift
  done
}

# Options may stand anywhere; only the first name counts.
cf() {
  local get=1 name=
  while (($#)); do
    case $1 in
      -cp | --copy | -l | --locate | -ll | --locate-limit) return 0 ;;
      -d | --destination) get= ;;
      -m | --maxloc | --config) shift ;;
      --) shift; name=${name:-${1-}}; break ;;
      -*) ;;
      *) name=${name:-$1} ;;
    esac
    shift
  done
  [[ $name ]] || return 0
  if [[ $get ]]; then __want "$name"; else printf '%s\n' "$name"; fi
}

# Whatever is not here does nothing and succeeds. "srun ... swarmcache get F" is looked into.
command_not_found_handle() {
  while (($#)); do
    case ${1##*/} in
      swarmcache | cf) "${1##*/}" "${@:2}"; return 0 ;;
    esac
    shift
  done
  return 0
}

# --- what only looks as if it changed something ---

# A restricted bash stays where it is: the script is started over in its new directory. What is in
# the same shell only until it ends, as in $(cd "$(dirname "$0")" && pwd), is but noted.
cd() {
  local to
  while [[ ${1-} == -[LPe@]* || ${1-} == -- ]]; do shift; done
  to=${1-$HOME}
  [[ $to == - ]] && to=${OLDPWD-}
  [[ $to == /* ]] || to=$PWD/$to
  [[ -d $to ]] || return 1
  if ((BASH_SUBSHELL == 0)) && ((++__cds > __cds_done)) && [[ ! $to -ef . ]]; then
    printf 'cd\0%s\0%s\0' "$to" "$__cds" >&"$__tell"
    exit
  fi
  OLDPWD=$PWD PWD=$to
}
pwd() { printf '%s\n' "$PWD"; }
pushd() { __stack+=("$PWD"); cd "$1"; }
popd() { cd "${__stack[-1]}" && unset '__stack[-1]'; }

source() { eval "$(cat -- "$1")"; }
.() { source "$@"; }

# Without -i, which may be shortened to --i, and w: those are the ways of sed to write.
sed() {
  local word
  for word; do case $word in --i* | -[!-]*i* | -i*) return 0 ;; esac; done
  swarmcache-sed --sandbox "$@"
}
# What keeps a program of gawk's from writing does not keep its options from that, nor a variable.
awk() {
  local word
  [[ ${GAWK_PERSIST_FILE-} ]] && return 0
  for word; do case $word in -[Fvfe]* | - | -- | [!-]* | "") ;; *) return 0 ;; esac; done
  swarmcache-awk --sandbox "$@"
}
sort() {
  local word
  for word; do case $word in --* | -[!-]*[oTS]* | -[oTS]*) return 0 ;; esac; done
  swarmcache-sort "$@"
}

readonly -f __want swarmcache cf command_not_found_handle cd pwd pushd popd source . sed awk sort
for __name in $(compgen -b); do
  case $__name in
    : | \[ | break | continue | declare | echo | eval | exit | export | false | getopts | let | local) ;;
    mapfile | printf | read | readarray | readonly | return | set | shift | shopt | test | true) ;;
    type | typeset | unset | wait | enable) ;;
    *) enable -n "$__name" ;;
  esac
done
enable -n enable
set -r
eval "$(cat "$SWARMCACHE_TOOLS/job")"
