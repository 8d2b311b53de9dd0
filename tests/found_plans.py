"""Plans with which the campaign has found bugs, each shortened to the faults and jobs it takes.

Whole plans, since what a seed stands for changes whenever plans are drawn differently.
"""

from __future__ import annotations

from simulations.faults import Fault
from simulations.plans import Job, Plan
from simulations.settings import ClusterSettings

FOUND = {
    "the tracker ended: it looked for a lost node among the readers of its other swarms": Plan(
        seed=356,
        theme="processes",
        settings=ClusterSettings(
            nodes=4,
            seed=356,
            node_rate=12000000.0,
            file_server_rate=12000000.0,
            slots_max=1,
            peers_max=4,
            latency_s=0.01,
            check_every=1,
            originals=True,
            piece_bytes=131072,
            clock_spread_s=500.0,
        ),
        sizes_bytes=(1310720, 1835008, 843050, 786432),
        jobs=(
            Job(at_s=0.109937, node=0, file=1, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.133917, node=2, file=2, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.159687, node=3, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.165801, node=2, file=1, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.216779, node=1, file=1, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.5994, node=0, file=0, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.616088, node=2, file=0, user="bob", can_read=True, chunk_size_bytes=262144),
        ),
        faults=(
            Fault(at_s=0.114234, kind="chunk absent", node=1),
            Fault(at_s=0.123922, kind="peer message late", node=2, duration_s=0.041732),
            Fault(at_s=0.285234, kind="message to tracker late", duration_s=0.452566),
            Fault(at_s=0.536147, kind="message to tracker late", node=3, duration_s=2.189543),
            Fault(at_s=0.541946, kind="message to tracker late", duration_s=2.438421),
            Fault(at_s=0.654799, kind="message from tracker late", node=3, duration_s=1.59727),
            Fault(at_s=0.662848, kind="peer message late", node=2, duration_s=0.573662),
            Fault(at_s=0.758336, kind="peer message late", node=1, duration_s=0.097355),
            Fault(at_s=4.20923, kind="daemon killed", node=3, duration_s=6.847439, amount=0.409339),
            Fault(at_s=4.410203, kind="message to tracker late", node=2, duration_s=0.929648),
            Fault(at_s=4.440475, kind="message to tracker late", node=2, duration_s=0.044142),
            Fault(at_s=4.672806, kind="message to tracker late", node=2, duration_s=1.434025),
            Fault(at_s=4.82584, kind="message to tracker late", node=2, duration_s=2.080473),
            Fault(at_s=4.894228, kind="message to tracker late", node=2, duration_s=0.108253),
            Fault(
                at_s=4.946945,
                kind="daemon killed, partial files torn",
                other=1,
                duration_s=0.094413,
                amount=0.967258,
            ),
            Fault(at_s=4.967836, kind="message to tracker late", node=2, duration_s=1.483155),
            Fault(at_s=6.161337, kind="message to tracker late", node=1, duration_s=1.63842),
            Fault(
                at_s=7.262044,
                kind="daemon killed, partial files torn",
                node=2,
                other=1,
                duration_s=0.134904,
                amount=0.742837,
            ),
        ),
    ),
    "a replica that is cut differently made its holder look like a liar": Plan(
        seed=39,
        theme="file server",
        settings=ClusterSettings(
            nodes=4,
            seed=39,
            node_rate=24000000.0,
            file_server_rate=12000000.0,
            slots_max=1,
            uploads_max=2,
            check_every=1,
            originals=True,
            piece_bytes=131072,
            disk_bytes=2359296.0,
        ),
        sizes_bytes=(1277782, 1048576, 2097152, 2359296),
        jobs=(
            Job(at_s=0.006753, node=1, file=3, user="bob", can_read=True, chunk_size_bytes=524288),
            Job(at_s=0.715144, node=3, file=3, user="bob", can_read=True, chunk_size_bytes=262144),
        ),
        faults=(),
        mixed_cuts=True,
    ),
    "who parted from a neighbour that it could not reach was never introduced to it again": Plan(
        seed=20312,
        theme="cuts",
        settings=ClusterSettings(
            nodes=3,
            seed=20312,
            node_rate=24000000.0,
            file_server_rate=24000000.0,
            slots_max=2,
            check_every=1,
            originals=True,
            piece_bytes=131072,
            reader_cost=0.05,
        ),
        sizes_bytes=(1048576, 2543110),
        jobs=(
            Job(at_s=0.258653, node=1, file=0, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=1.528591, node=1, file=1, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=2.57793, node=2, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=3.866726, node=2, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
        ),
        faults=(
            Fault(at_s=0.339436, kind="message to tracker late", node=1, duration_s=1.08849),
            Fault(at_s=0.358295, kind="message from tracker late", node=1, duration_s=0.9545),
            Fault(at_s=2.983605, kind="message to tracker late", node=1, duration_s=0.010641),
            Fault(at_s=3.003413, kind="message from tracker late", node=1, duration_s=1.353605),
            Fault(
                at_s=3.301474,
                kind="partition",
                node=2,
                other=1,
                duration_s=7.106514,
                amount=0.611361,
            ),
        ),
    ),
    "after the source had changed the tracker forgot replicas that their nodes kept": Plan(
        seed=20703,
        theme="file server",
        settings=ClusterSettings(
            nodes=4,
            seed=20703,
            node_rate=12000000.0,
            file_server_rate=12000000.0,
            slots_max=3,
            latency_s=0.01,
            check_every=1,
            originals=True,
            piece_bytes=131072,
            clock_spread_s=500.0,
        ),
        sizes_bytes=(2359296, 1089183),
        jobs=(
            Job(at_s=0.876232, node=3, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=2.316105, node=2, file=1, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=2.822549, node=2, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
        ),
        faults=(
            Fault(at_s=0.36323, kind="message to tracker late", node=2, duration_s=0.446074),
            Fault(at_s=2.620082, kind="message from tracker late", node=2, duration_s=2.202289),
            Fault(at_s=3.575541, kind="message to tracker late", node=3, duration_s=1.162391),
            Fault(
                at_s=3.70864, kind="source changed", other=3, duration_s=10.889399, amount=0.011974
            ),
        ),
    ),
    "the same, with a holder that was stopped": Plan(
        seed=21258,
        theme="file server",
        settings=ClusterSettings(
            nodes=5,
            seed=21258,
            node_rate=24000000.0,
            file_server_rate=24000000.0,
            slots_max=2,
            uploads_max=2,
            latency_s=0.01,
            check_every=1,
            originals=True,
            piece_bytes=131072,
            clock_spread_s=500.0,
        ),
        sizes_bytes=(1048576, 90077, 262144),
        jobs=(
            Job(at_s=0.589205, node=2, file=0, user="bob", can_read=True, chunk_size_bytes=262144),
            Job(at_s=0.964375, node=2, file=2, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=1.265182, node=1, file=1, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=1.681975, node=1, file=2, user="ada", can_read=True, chunk_size_bytes=262144),
            Job(at_s=2.521611, node=1, file=0, user="ada", can_read=True, chunk_size_bytes=262144),
        ),
        faults=(
            Fault(at_s=0.050203, kind="write of a range failed", node=2),
            Fault(at_s=0.214602, kind="write of a range failed", node=2),
            Fault(at_s=0.358575, kind="read slow", node=2, duration_s=0.190997),
            Fault(at_s=0.560222, kind="message to tracker late", node=1, duration_s=1.900044),
            Fault(
                at_s=1.34139, kind="daemon stopped", node=2, duration_s=5.669411, amount=0.940437
            ),
            Fault(at_s=1.920734, kind="message from tracker late", node=1, duration_s=2.415068),
            Fault(at_s=3.32532, kind="message from tracker late", node=1, duration_s=2.447023),
            Fault(at_s=6.309953, kind="message to tracker late", node=1, duration_s=1.488216),
            Fault(
                at_s=6.900494, kind="source changed", node=1, duration_s=1.232595, amount=0.848443
            ),
        ),
    ),
}
