"""Which files a job script asks for, and that looking for them does nothing else."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmcache.job_files import Look, rewrite
from swarmcache.job_script import JobScript, NoPreference
from tests.box import wait_until

pytestmark = pytest.mark.slow
LookInto = Callable[..., list[str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files a to h, each with some content, and a list of some of them."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in "abcdefgh":
        (directory / name).write_text("content")
    (directory / "list").write_text("a\nb\nc\n")
    return directory


@pytest.fixture
def look(tmp_path: Path, data: Path) -> LookInto:
    """The names of the files below ``data`` that a script asks for."""

    def look(text: str, *arguments: str, timeout_s: float = 10.0, **variables: str) -> list[str]:
        script = JobScript(
            os.fsencode(text if text.startswith("#!") else "#!/bin/bash\n" + text),
            str(tmp_path / "job.sh"),
            list(arguments),
        )
        with Look(script, tmp_path) as looking:
            found = looking.files({"DATA": str(data), **variables}, timeout_s)
        return [os.path.relpath(os.fsdecode(path), data) for path in found]

    return look


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("X=$(swarmcache get $DATA/a)", "a"),
        ('X="$(swarmcache get "$DATA/a" "$DATA/b" 2>/dev/null)"', "ab"),
        ("X=`cf $DATA/a`; cf $DATA/b > x; cf $DATA/a", "ab"),
        ("swarmcache get --strict --timeout 5 --config=x -- $DATA/a", "a"),
        ("swarmcache cf -m 3 $DATA/a ignored", "a"),
        ("/usr/local/bin/cf $DATA/a; $HOME/venv/bin/swarmcache get $DATA/b", "ab"),
        ('"$HOME/bin/cf" $DATA/a; X=$(/usr/local/cache-manager/cf $DATA/b)', "ab"),
        ("srun -n 2 --mpi=none /usr/bin/swarmcache get $DATA/a", "a"),
        ("time swarmcache get $DATA/a; nice -n 5 swarmcache get $DATA/b &", "ab"),
        ("set -euo pipefail; echo $NOT_SET; false; /bin/false; cf $DATA/a", "a"),
        ("export PATH=/opt/bin:$PATH\nPATH=$PATH:/x; cf $DATA/a", "a"),
        ("cf data/a; ls data | head -n 2 | while read f; do cf data/$f; done", "ab"),
        ("for f in $DATA/[a-c]; do cf $f; done", "abc"),
        ("for ((i = 0; i > -1 && i < 3; i++)); do F=($DATA/*); cf ${F[i]}; done", "abc"),
        ("while read -r f; do cf $DATA/$f; done < $DATA/list", "abc"),
        ("mapfile -t P < <(sed 's/$//' $DATA/list); cf $DATA/${P[1]}", "b"),
        ("fetch() { local f; for f; do cf $DATA/$f; done; }; fetch a b", "ab"),
        ("if [[ 2 > 1 ]]; then cf $DATA/a; else cf $DATA/b; fi", "a"),
        ("[ -s $DATA/missing ] && cf $DATA/b; [ -s $DATA/a ] && cf $DATA/a", "a"),
        ("case $DATA in */data) cf $DATA/a ;; esac", "a"),
        ("declare -A F=([train]=a [dev]=b); cf $DATA/${F[dev]}", "b"),
        ("cd $DATA\ncf a\ncd ..\ncf data/b; (cd data; cf c; head -n 1 list)", "abc"),
        ("cd $DATA; for f in [ab]; do cf $f; done; cat < list > /dev/null; cf c", "abc"),
        ('cd "$(cd "$(dirname "$0")" && pwd)/data" && cf a', "a"),
        ("pushd $DATA; popd; cf data/a", "a"),
        ("echo 'cf $DATA/b' > own.sh; source $DATA/../inc.sh; cf $FROM_INC", "a"),
        ("eval 'X=$(cf $DATA/a)'", "a"),
        ("cf $(sed -n 2p $DATA/list | tr b a | xargs)$DATA/a", "a"),
        ("cf $DATA/$(basename /x/a.gz .gz); cf $(realpath $DATA/../data/b)", "ab"),
        ("{ cf $DATA/a; } > log 2>&1; (cf $DATA/b) &>> log; cf $DATA/c 3>&1 | tee log", "abc"),
        ('python train.py > "$LOG" 2>&1; cf $DATA/a', "a"),
        ("python - <<END > out\nif a > b: print('don`t $(oh) \"')\nEND\ncf $DATA/a", "a"),
        ("exec 3> log > out; exec 2>&1; cf $DATA/a", "a"),
        ("cf $DATA/missing; cf /dev/null/x; cf; swarmcache; swarmcache get", ""),
        ("cf -cp $DATA/a $DATA/b; cf -d $DATA/c; cf -l $DATA/d; swarmcache cp $DATA/e x", ""),
        ("cf $DATA/a; exit 0; cf $DATA/b", "a"),
        ("cf $DATA/a; )(; cf $DATA/b", ""),
        ("cf() { /usr/local/bin/cf $1 || echo $1; }; cf $DATA/a", "a"),
        ("#!/bin/sh -e\ncf $DATA/a", "a"),
        ("#!/usr/bin/env bash\ncf $DATA/a", "a"),
        ("#! /bin/bash -l\ncf $DATA/a", "a"),
    ],
)
def test_what_a_script_asks_for_is_found(
    look: LookInto, tmp_path: Path, text: str, files: str
) -> None:
    (tmp_path / "inc.sh").write_text("FROM_INC=$DATA/a\n")

    assert look(text) == list(files)


def test_a_script_sees_its_arguments_and_the_variables_of_its_task(look: LookInto) -> None:
    text = 'NAMES=(a b c)\ncf "$DATA/$1" "$2"; cf $DATA/${NAMES[$TASK]}\n'
    text += "[ $SWARMCACHE_DRY_RUN ] && cf $DATA/h"

    assert look(text, "d", "e", TASK="1") == ["d", "b", "h"]


def test_any_name_is_found_as_it_is(look: LookInto, data: Path) -> None:
    names = ["with space", "new\nline", "-dash", os.fsdecode(b"not \xff utf8"), "'\"$x`"]
    for name in names:
        (data / name).touch()

    assert sorted(look('cd "$DATA"; for f in *[!a-z]*; do cf -- "$f"; done')) == sorted(names)


WAYS_TO_DESTROY = [
    "rm -rf $VICTIM",
    "/bin/rm -rf $VICTIM; command rm -rf $VICTIM; \\rm -rf $VICTIM; env rm -rf $VICTIM",
    "bash -c 'rm $VICTIM'; $SHELL -c 'rm $VICTIM'; exec rm $VICTIM",
    "export PATH=/bin:/usr/bin; PATH=/bin rm $VICTIM; declare -x PATH=/bin; rm $VICTIM",
    "unset PATH; hash -p /bin/rm rm; rm $VICTIM",
    "alias rm=/bin/rm; shopt -s expand_aliases; rm $VICTIM",
    "echo > $VICTIM; echo >> $VICTIM; echo >| $VICTIM; echo &> $VICTIM; echo 1<> $VICTIM",
    "> $VICTIM; : > $VICTIM; { true; } > $VICTIM; exec > $VICTIM; while false; do :; done >$VICTIM",
    "X=$(echo > $VICTIM); echo <(echo > $VICTIM) >(cat > $VICTIM)",
    "eval 'echo > $VICTIM'; source $VICTIM > $VICTIM",
    "W='> $VICTIM'; eval \"echo $W\"; eval echo \\> $VICTIM",
    "trap 'rm $VICTIM; echo > $VICTIM' EXIT DEBUG ERR",
    "set +r; shopt -u restricted_shell; exec 5> $VICTIM; rm $VICTIM",
    "enable rm kill exec command; builtin exec rm $VICTIM; enable -f /bin/rm rm",
    "sed -i s/x/y/ $VICTIM; sed -n -i p $VICTIM; sed --in-place s/x/y/ $VICTIM; sed -ni p $VICTIM",
    "sed --i s/x/y/ $VICTIM; sed s/x/y/ --i=.bak $VICTIM; sed -n --in-pl p $VICTIM",
    "sed -e 'w '$VICTIM $DATA/a; sed '1e rm '$VICTIM $DATA/a; command sed -i d $VICTIM",
    "sort -o $VICTIM $DATA/a; sort -no $VICTIM $DATA/a; sort --output=$VICTIM $DATA/a",
    'awk \'BEGIN { system("rm " ENVIRON["VICTIM"]); print > ENVIRON["VICTIM"] }\'',
    "awk -o$VICTIM 1 $DATA/a; awk -p$VICTIM 1 $DATA/a; awk -vX=1 -d$VICTIM 1; awk --du=$VICTIM 1",
    "history -w $VICTIM; fc -e 'rm $VICTIM'; HISTFILE=$VICTIM",
    "cp $DATA/a $VICTIM; mv $VICTIM x; tee $VICTIM; dd of=$VICTIM; ln -sf x $VICTIM",
    "python3 - <<END\nimport os; os.remove(os.environ['VICTIM'])\nEND",
    "python3 -c \"open('$VICTIM', 'w')\"; perl -e 'unlink $ENV{VICTIM}'",
    "swarmcache() { rm $VICTIM; }; cf() { echo > $VICTIM; }; unset -f cf; cf x",
    "command_not_found_handle() { /bin/rm $VICTIM; }; nosuch",
    "cd() { echo > $VICTIM; }; cd /; source() { rm $VICTIM; }; . $VICTIM",
    "srun rm $VICTIM; srun bash -c 'echo > $VICTIM'; swarmcache rm $VICTIM; cf -cp x $VICTIM",
    "kill $BYSTANDER; builtin kill $BYSTANDER; enable kill; kill $BYSTANDER; enable -n true",
    "suspend; logout; ulimit -f 0; umask 777; disown -a; fg; bg; times; history -w victim",
    "#!/bin/bash\n#SBATCH -o $VICTIM\n[[ a > $VICTIM ]] || ((1 > 0)) && [ a \\> $VICTIM ]",
    "BASH_ENV=$VICTIM ENV=$VICTIM LD_PRELOAD=$VICTIM cat $VICTIM; coproc rm $VICTIM; wait",
]


@pytest.mark.parametrize("text", WAYS_TO_DESTROY)
def test_the_work_of_a_script_is_not_done(
    look: LookInto, tmp_path: Path, data: Path, text: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("x\n")
    before = everything_in(tmp_path)
    with subprocess.Popen(["sleep", "20"]) as bystander:
        # With eval, redirections are not rewritten; a restricted bash must do.
        for changed in (text, f"eval {quoted(text)}"):
            variables = {"VICTIM": str(victim), "BYSTANDER": str(bystander.pid)}

            assert look(f"cf $DATA/a\n{changed}", **variables) == ["a"]

            assert everything_in(tmp_path) == before
            assert bystander.poll() is None
        bystander.kill()


def test_awk_is_run_where_no_option_of_it_can_write(
    look: LookInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with -o, -p, -d, -D, -l and -i inplace. GNU's is not everywhere, so this is none."""
    gawk = tmp_path / "bin/gawk"
    gawk.parent.mkdir()
    gawk.write_text('#!/bin/sh\necho "$DATA/a"\n')
    gawk.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gawk.parent}:{os.environ['PATH']}")
    run = ["1", "-F, 1", "-F - -v x=1 -vy=2 -f a -e b -- c -", "'' 1"]
    not_run = ["-ox 1", "-d 1", "-px 1", "--pretty 1", "-F, -S -ox 1", "-v x=1 --du 1", "-i x 1"]

    for words in run:
        assert look(f"cf $(awk {words})") == ["a"], words
    for words in not_run:
        assert look(f"cf $(awk {words})") == [], words
    assert look("export GAWK_PERSIST_FILE=heap; cf $(awk 1)") == []


def everything_in(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(directory.rglob("*"))
    }


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@pytest.mark.parametrize(
    "text",
    [
        "trap '' TERM INT; sleep 1000; while true; do sleep 1; done",
        "cat $DATA/fifo",
        "(while :; do :; done) & while :; do echo x; done | while :; do :; done",
        # They fork without end, and stay as many: all the process ids that the machine has would be
        # missing in the tests beside this one.
        "f() { f & }; for i in {1..50}; do f; done; while :; do :; done",
    ],
)
def test_a_script_that_does_not_end_is_ended_with_all_that_it_has_started(
    look: LookInto, data: Path, text: str
) -> None:
    os.mkfifo(data / "fifo")
    begun_s = time.monotonic()

    assert look(f"cf $DATA/a\n{text}\ncf $DATA/b", timeout_s=2.0) == ["a"]
    assert time.monotonic() - begun_s < 20
    wait_until(lambda: not processes_with(str(data)), 20.0, "the end of what was killed")


@pytest.mark.parametrize(
    "text", ["f() { f; }; f\ncf $DATA/a", "(while :; do :; done) & cf $DATA/a; exit"]
)
def test_what_a_script_leaves_behind_holds_nobody_up(look: LookInto, data: Path, text: str) -> None:
    begun_s = time.monotonic()

    assert look(text, timeout_s=60.0) == ["a"]
    assert time.monotonic() - begun_s < 30
    wait_until(lambda: not processes_with(str(data)), 20.0, "the end of what was killed")


def processes_with(text: str) -> list[str]:
    """Processes that have the text in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"DATA=" + text.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # it has just ended
    return found


def test_functions_in_the_environment_and_files_of_the_user_are_not_run(
    look: LookInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.sh"
    own.write_text("cf $DATA/b\n")
    monkeypatch.setenv("BASH_FUNC_cat%%", "() { cf $DATA/b; }")
    for variable in ("BASH_ENV", "ENV"):
        monkeypatch.setenv(variable, str(own))
    monkeypatch.setenv("SHELLOPTS", "noexec")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bashrc").write_text("cf $DATA/b\n")
    (tmp_path / ".bash_profile").write_text("cf $DATA/b\n")

    assert look("cat /dev/null; cf $DATA/a") == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"#!/usr/bin/env python3\nprint(1)\n", "python3"),
        (b"#!/usr/bin/perl -w\n", "perl"),
        (b"#!\n", "nothing"),
        (b"echo\n", "does not begin with #!"),
        (b"#!/bin/bash\n\0\x7fELF", "no shell"),
    ],
)
def test_what_is_no_shell_script_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    with pytest.raises(NoPreference, match=reason):
        Look(JobScript(text, "job"), tmp_path)


def test_a_job_directory_that_is_not_there_means_no_files(tmp_path: Path) -> None:
    script = JobScript(b"#!/bin/sh\ncf /etc/passwd\n", "job")

    with Look(script, tmp_path / "missing") as look:
        assert look.files({}) == []


@pytest.mark.parametrize("piece", [b'"$(a) ', b'"', b"$(", b"((", b"[[ ", b">", b"/a", b"!"])
def test_no_text_takes_long_to_rewrite(piece: bytes) -> None:
    """Patterns that try everything would take longer than the universe is old."""
    begun_s = time.monotonic()

    rewrite(b'"' + piece * 2000)

    assert time.monotonic() - begun_s < 20


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        (b"a > b", b"a >&199"),
        (b"a 2>/dev/null >$X", b"a 2>&199 >&199"),
        (b"a >>'b c'\"d $(e > f)\" g", b"a >&199 g"),
        (b'X="$(a 2> b)" > c', b'X="$(a 2>&199)" >&199'),
        (b"a &> b; a &>> b", b"a >&199 2>&199; a >&199 2>&199"),
        (b"a >&2 2>&1 <b <<<c", b"a >&2 2>&1 <b <<<c"),
        (b"a >(b) <(c)", b"a >(b) <(c)"),
        (b"{fd}> a", b"{fd}>&199"),
        (b"x2>a", b"x2>&199"),
        (b"[[ a > b ]] && ((c > d)) # e > f", b"[[ a > b ]] && ((c > d)) # e > f"),
        (b"echo 'a > b' \"c > d\" e-\\>f", b"echo 'a > b' \"c > d\" e-\\>f"),
        (b"set -e; set -- a", b": -e; set -- a"),
        (b"swarmcache get /data/cat", b"swarmcache get /data/cat"),
        (b"/bin/cat /bin/cat", b"cat /bin/cat"),
    ],
)
def test_redirections_lead_nowhere_and_nothing_else_is_rewritten(
    text: bytes, rewritten: bytes
) -> None:
    assert rewrite(text) == rewritten
