# shellcheck shell=sh
# Put before every test's script; busybox ash. Results go to the second serial port, so that messages
# of the kernel on the first cannot break into their lines.
stty -F /dev/ttyS1 raw -echo
exec 3>/dev/ttyS1

# show NAME VALUE...: something for the host to judge
show() { local name=$1; shift; echo "RESULT $name ok $*" >&3; }

# check NAME COMMAND...: the command must succeed
check() {
    local name=$1; shift
    if "$@" >/tmp/output 2>&1; then
        echo "RESULT $name ok" >&3
    else
        echo "RESULT $name fail exit $?: $* -- $(tail -n 5 /tmp/output | tr '\n' ' ')" >&3
    fi
    cat /tmp/output
}

# refuse NAME COMMAND...: the command must fail
refuse() {
    local name=$1; shift
    if "$@" >/tmp/output 2>&1; then
        echo "RESULT $name fail succeeded: $*" >&3
    else
        echo "RESULT $name ok $(tail -n 1 /tmp/output)" >&3
    fi
    cat /tmp/output
}

# pattern TAG COUNT: COUNT records of 16 bytes, each different; pattern.rs makes the same ones
pattern() { awk -v tag="$1" -v count="$2" 'BEGIN { for (i = 0; i < count; i++) printf "%-4s:%010d\n", tag, i }'; }

