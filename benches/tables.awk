# The tables of BENCHMARKS.md, from the logs of one bench, which are those of several runs: each with
# its name, as it stands in BENCHMARKS.md.

function add(key, value) {
    values[key, ++count[key]] = value
}

# The values of a key by size: the at-th of count[key].
function sorted(key, at,    i, j, value) {
    for (i = 2; i <= count[key]; i++) {
        value = values[key, i]
        for (j = i - 1; j >= 1 && values[key, j] > value; j--) values[key, j + 1] = values[key, j]
        values[key, j + 1] = value
    }
    return values[key, at]
}

function median(key) {
    return sorted(key, int((count[key] + 1) / 2))
}

# The lowest and the highest.
function span(key,    low, high) {
    low = sprintf("%.2f", sorted(key, 1))
    high = sprintf("%.2f", sorted(key, count[key]))
    return low == high ? low : low " to " high
}

function short(value) {
    return value < 10 ? sprintf("%.1f", value) : sprintf("%.0f", value)
}

# A row for each operation, a column for each number of regions.
function access_table(name, operations, titles,    rows, row, column, columns, at) {
    print "<!-- " name " -->"
    print "| regions | 1 | 2 | 8 | 64 | 509 |\n|---|---|---|---|---|---|"
    split("1 2 8 64 509", columns)
    rows = split(operations, row)
    for (at = 1; at <= rows; at++) {
        printf "| %s |", row[at] == "virtqueue" ? "all that a device does for a request" : "`" row[at] "`"
        for (column = 1; column <= 5; column++) printf " %s |", short(median(name row[at] columns[column]))
        print ""
    }
}

FNR == 1 { part = "" }

/^operation/ { part = "access" }
/^on the type itself/ { part = "access, on the type" }
bench ~ /^access/ && part ~ /^access/ && $2 ~ /^[0-9]+$/ {
    add(part $1 $2, $5)
    if (part == "access") add("cost", ($7 - 1) * 100)
}

bench == "create" && /^(memfd|POSIX shm) / { add($1, $NF) }

bench == "share" && /^ratio/ { add("share", $2) }

bench == "address_space" && /^daemons/ { part = "busy" }
bench == "address_space" && /^and where the daemons/ { part = "late" }
bench == "address_space" && /^(1|4|16|64) / && NF == 11 && $2 ~ /^[0-9]+$/ {
    add(part $1, $9)
    add(part " question" $1, $11)
}
bench == "address_space" && /^1 GiB/ { add("size", $NF) }
bench == "address_space" && match($0, /  +[-0-9.]+ +[-0-9.]+$/) && /^(a change|connecting), / {
    title = substr($0, 1, RSTART - 1)
    if (!((title, "median") in count)) rows[++row_count] = title
    add(title SUBSEP "median", $(NF - 1))
    add(title SUBSEP "longest", $NF)
}
/^regions only: / { add("reconnect", $NF) }
/^whole session: / { add("session", $NF) }

bench == "storage_daemon" && /^(1|4) / && NF == 11 && $2 ~ /^[0-9]+$/ {
    add("real" $1, $9)
    add("real question" $1, $11)
}

bench == "facts" && match($0, /  +/) && /[^ ]s$/ {
    title = substr($0, 1, RSTART - 1)
    if (!(title in count)) rows[++row_count] = title
    add(title, 0)
    for (at = 0; at < 3; at++) last[title, at] = $(NF - 2 + at)
}

bench == "discard" && /^(memfd|POSIX shm) +(1 GiB|4 KiB)/ {
    add(($1 == "memfd" ? "memfd " : "shm ") (/1 GiB/ ? "GiB" : "KiB"), $NF)
}

bench == "populate_vs_qemu" && / ms .*<= / {
    title = substr($0, 1, 52)
    sub(/ +$/, "", title)
    if (!(title in count)) rows[++row_count] = title
    for (at = 1; at < NF; at++) if ($(at) == "<=") add(title, $(at - 2))
}

END {
    if (bench == "access") {
        access_table("access", "read_obj write_obj load get_slice get_host_address virtqueue")
        # Less than nothing is noise.
        low = sorted("cost", 1)
        printf "<!-- access, published -->\n%.0f to %.0f percent, %.1f in the middle\n",
            (low < 0 ? 0 : low), sorted("cost", count["cost"]), median("cost")
    }
    if (bench == "access_on_type") {
        access_table("access, on the type", "write_obj read_obj write_slice read_slice")
    }
    if (bench == "create") {
        print "<!-- create -->\n| | times the smaller one's |\n|---|---|"
        print "| memfd, 1 TiB and 1 GiB | " span("memfd") " |"
        print "| POSIX shm, 1 GiB and 1 MiB | " span("POSIX") " |"
    }
    if (bench == "share") {
        print "<!-- share -->\n" span("share") " times"
    }
    if (bench == "address_space") {
        print "<!-- address_space -->\n| daemons | 1 | 4 | 16 | 64 |\n|---|---|---|---|---|"
        printf "| busy with nothing but this, all on the same CPUs |"
        printf " %s | %s | %s | |\n", span("busy1"), span("busy4"), span("busy16")
        printf "| the same, where the bare side asks each daemon, too, whether it is still there |"
        printf " %s | %s | %s | |\n", span("busy question1"), span("busy question4"), span("busy question16")
        printf "| each takes 3 ms for something else |"
        printf " %s | %s | %s | %s |\n", span("late1"), span("late4"), span("late16"), span("late64")
        print "<!-- address_space, size -->\n" span("size") " times"
        print "<!-- address_space, deadline -->\n| | median, ms | longest, ms |\n|---|---|---|"
        for (at = 1; at <= row_count; at++) {
            title = rows[at]
            print "| " title " | " span(title SUBSEP "median") " | " span(title SUBSEP "longest") " |"
        }
    }
    if (bench == "storage_daemon") {
        print "<!-- storage_daemon -->\n| daemons | 1 | 4 |\n|---|---|---|"
        print "| the bare messages | " span("real1") " | " span("real4") " |"
        print "| with the question | " span("real question1") " | " span("real question4") " |"
    }
    if (count["session"]) {
        print "<!-- " bench ", reconnect -->\n" span("reconnect") " times"
        print "<!-- " bench ", session -->\n" span("session") " times"
    }
    if (bench == "facts") {
        print "<!-- facts -->\n| RAM | `stats` | `extents`, steps of 2 MiB | `extents`, steps of 4 KiB |\n|---|---|---|---|"
        for (at = 1; at <= row_count; at++) {
            title = rows[at]
            print "| " title " | " last[title, 0] " | " last[title, 1] " | " last[title, 2] " |"
        }
    }
    if (bench == "discard") {
        print "<!-- discard -->\n| | 1 GiB | 4 KiB |\n|---|---|---|"
        print "| memfd | " span("memfd GiB") " | " span("memfd KiB") " |"
        print "| POSIX shm | " span("shm GiB") " | " span("shm KiB") " |"
    }
    if (bench == "populate_vs_qemu") {
        print "<!-- populate_vs_qemu -->\n| | this crate's time as a part of the other's |\n|---|---|"
        for (at = 1; at <= row_count; at++) print "| " rows[at] " | " span(rows[at]) " |"
    }
}
