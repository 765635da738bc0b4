#!/usr/bin/env bash
# Starts Slurm on this machine alone, for tests/test_slurm.py: one node, a partition and one whose jobs preempt those of
# the first, no accounting, no cgroups.
#
#     apt-get install -y slurm-wlm munge && bash tests/slurm_one_machine.sh start
#     bash tests/slurm_one_machine.sh stop
#
# Needs root.  It writes /etc/slurm/slurm.conf, and refuses to where another hand has written one.
set -euo pipefail

conf=/etc/slurm/slurm.conf
mark="# written by tests/slurm_one_machine.sh"
state=/var/lib/slurm-one-machine

stop() {
    for name in slurmd slurmctld munged; do
        pid=$(cat "$state/$name.pid" 2> /dev/null || true)
        if [ -n "$pid" ] && kill "$pid" 2> /dev/null; then
            while kill -0 "$pid" 2> /dev/null; do sleep 0.2; done
        fi
        rm -f "$state/$name.pid"
    done
}

start() {
    if [ -s "$conf" ] && ! grep -q "$mark" "$conf"; then
        echo "error: $conf is not this script's; Slurm is configured here already" >&2
        exit 1
    fi
    stop
    mkdir -p "$state/spool" /run/munge /etc/slurm
    chown munge: /run/munge
    cat > "$conf" << END
$mark
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
StateSaveLocation=$state
SlurmdSpoolDir=$state/spool
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 $(slurmd -C | grep -o 'CPUs=[0-9]*') $(slurmd -C | grep -o 'RealMemory=[0-9]*')
PartitionName=one Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
END
    runuser -u munge -- /usr/sbin/munged --pid-file=/run/munge/munged.pid
    cp /run/munge/munged.pid "$state/munged.pid"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --partition=one --format=%t 2> /dev/null)" = idle ]; then
            sinfo
            return
        fi
        sleep 0.5
    done
    echo "error: the node is not idle after 30 s; see $state/slurmctld.log and $state/slurmd.log" >&2
    tail -n 5 "$state/slurmctld.log" "$state/slurmd.log" >&2
    exit 1
}

case "${1:-}" in
    start | stop) "$1" ;;
    *) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
