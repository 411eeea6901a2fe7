#!/usr/bin/env bash
# Populates RAM by QEMU's memory backends and by this crate, in turn, and prints the times and their
# ratios beside the targets.
#
#   SIZE=4096 ROUNDS=5 benches/populate_vs_qemu.sh     # MiB of RAM, and how often; these are the defaults
#
# All times are those of whole processes: one that populates, less the same one that does not. So
# they hold what populating costs at the end, too: taking the page tables down, and freeing the
# pages. Within a round everything runs once, each round begins with another one, and the median over
# the rounds counts: other work on the machine hits all alike. Exits with 1 if a ratio is missed,
# unless REPORT_ONLY is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SIZE=${SIZE:-4096}
ROUNDS=${ROUNDS:-5}
SWITCH=/sys/kernel/mm/transparent_hugepage/shmem_enabled

skip() {
    if [ -n "${REQUIRE_PEERS:-}" ]; then
        echo "REQUIRE_PEERS is set, but $*" >&2
        exit 1
    fi
    echo "skipped: $*"
    exit 0
}

command -v qemu-system-x86_64 >/dev/null || skip 'qemu-system-x86_64 is not installed'
qemu-system-x86_64 -object help | grep -q memory-backend-shm ||
    skip 'this QEMU has no memory-backend-shm (it is in 9.1 and newer)'
available=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
[ "$available" -gt $((SIZE + SIZE / 4)) ] ||
    skip "$SIZE MiB of RAM and a quarter more are needed, $available MiB are available"
shm_free=$(df --output=avail -m /dev/shm | tail -n 1)
[ "$shm_free" -ge "$SIZE" ] || skip "/dev/shm has $shm_free MiB free, $SIZE are needed"

ours=$(cargo bench --quiet --no-run --bench populate --message-format=json |
    sed -n 's/.*"name":"populate".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -x "$ours" ] || { echo 'the bench "populate" was not built' >&2; exit 1; }

work=$(mktemp -d)
huge_before=
restore() {
    if [ -n "$huge_before" ]; then
        echo "$huge_before" >"$SWITCH"
    fi
    rm -rf "$work"
}
trap restore EXIT

qemu() { # the properties of the backend
    qemu-system-x86_64 -machine none -nodefaults -display none -monitor stdio \
        -object "memory-backend-shm,id=m,size=${SIZE}M,$1" <<<quit
}

crate() {
    "$ours" --size "$SIZE" "$@"
}

# Transparent huge pages are allowed as long as this runs only.
crate_huge() {
    echo advise >"$SWITCH"
    crate "$@"
    echo "$huge_before" >"$SWITCH"
}

run() {
    "$@" >"$work/output" 2>&1 || { cat "$work/output" >&2; exit 1; }
}

# Adds the milliseconds of a command to the times of its name. It is run twice, and the second time
# counts: a virtual machine gives memory that is free for a while back to its host, and then the
# first touch takes ten times as long.
clock() { # name, command
    local name=$1 start end
    shift
    run "$@"
    start=$EPOCHREALTIME
    run "$@"
    end=$EPOCHREALTIME
    echo $(((${end/./} - ${start/./}) / 1000)) >>"$work/$name"
}

runs=(
    'qemu-lazy qemu prealloc=off'
    'qemu-1 qemu prealloc=on'
    'qemu-2 qemu prealloc=on,prealloc-threads=2'
    'lazy crate --backing shm --mode lazy'
    'prefault-2 crate --backing shm --mode prefault --threads 2'
    'prefault crate --backing shm --mode prefault'
    'allocate-2 crate --backing shm --mode allocate --threads 2'
    'two crate --backing shm --mode prefault --threads 2 --backings 2'
)
if [ -w "$SWITCH" ]; then
    huge_before=$(sed 's/.*\[\(.*\)\].*/\1/' "$SWITCH")
    runs+=(
        'huge-2 crate_huge --backing thp --mode prefault --threads 2'
        'huge crate_huge --backing thp --mode prefault'
    )
else
    echo "no figures for transparent huge pages: only root may write $SWITCH"
fi

echo "$SIZE MiB, $ROUNDS rounds, $(nproc) CPUs, $(qemu-system-x86_64 --version | head -n 1)"
for ((round = 0; round < ROUNDS; round++)); do
    for ((at = 0; at < ${#runs[@]}; at++)); do
        # shellcheck disable=SC2086 # a name, and a command with its arguments
        clock ${runs[(at + round) % ${#runs[@]}]}
    done
done

median() {
    sort -n "$work/$1" | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}

best() {
    sort -n "$work/$1" | head -n 1
}

missed=0
# A line: what ran, less what it ran beside lazily, against the same of the other, at most. The
# ratio of the best times is beside that of the medians: it tells what other work has to do with it.
row() { # title, ours, its lazy twin, the other, its lazy twin, most
    [ -e "$work/$2" ] || return 0
    awk -v title="$1" -v most="$6" \
        -v mine=$(($(median "$2") - $(median "$3"))) \
        -v other=$(($(median "$4") - $(median "$5"))) \
        -v my_best=$(($(best "$2") - $(best "$3"))) \
        -v other_best=$(($(best "$4") - $(best "$5"))) 'BEGIN {
        ratio = mine / (other > 0 ? other : 1)
        of_best = my_best / (other_best > 0 ? other_best : 1)
        missed = ratio > most
        printf "%-52s %8d ms %8d ms %7.3f %7.3f  <= %.3f%s\n", title, mine, other, ratio, of_best,
            most, missed ? "  missed" : ""
        exit missed
    }' || missed=1
}

printf '%-52s %11s %11s %7s %7s  %s\n' '' 'this crate' 'QEMU' 'ratio' 'of best' 'aim'
row 'prefault, POSIX shm, 2 threads each' prefault-2 lazy qemu-2 qemu-lazy 0.95
row 'prefault, POSIX shm, default threads each' prefault lazy qemu-1 qemu-lazy 0.6
row 'allocate, POSIX shm, 2 threads; QEMU prefaults' allocate-2 lazy qemu-2 qemu-lazy 0.5
row 'huge pages, memfd, 2 threads each; QEMU: POSIX shm' huge-2 lazy qemu-2 qemu-lazy 0.167
row 'huge pages, default threads each; QEMU: POSIX shm' huge lazy qemu-1 qemu-lazy 0.167
printf '%-52s %11s %11s\n' '' 'two' 'one'
row 'prefault, two backings of half the size, 2 threads' two lazy prefault-2 lazy 1.15

echo 'Discard; the aim for 1 GiB is a ratio <= 1.1:'
cargo bench --quiet --bench discard

[ -n "${REPORT_ONLY:-}" ] || exit "$missed"
