use super::*;

const EXAMPLE: &str = r#"# Two disks of one guest.
exit-on-disconnect = true
verbose = 1

[[device]]
name = "root"
blk-file = "/images/root,1.img"
socket-path = "/run/vm/root.sock"
num-queues = 0x4
cpu-affinity = ["2-3", 5]
queue-threads = [0, 0, 1]
read-only = true

[[device]]
null = "1G"   # stores nothing
discard = false
"#;

#[test]
fn values_of_every_type_mean_what_the_flags_mean() {
    let text = EXAMPLE.replace("discard = false\n", "no-discard = false\n");
    let configuration = parse(&text).unwrap();
    assert!(configuration.program.exit_on_disconnect);
    assert_eq!(configuration.program.verbose, 1);
    let [root, other] = &configuration.devices[..] else {
        panic!("{configuration:?}");
    };
    let flags = "name=root,blk-file=/images/root,,1.img,socket-path=/run/vm/root.sock,num-queues=4,\
                 cpu-affinity=2-3,,5,queue-threads=0,,0,,1,read-only=on";
    let pairs = settings::split(&flags.into()).unwrap();
    let expected = settings::device(&pairs).unwrap();
    assert_eq!(format!("{:?}", root.arguments), format!("{expected:?}"));
    assert_eq!(other.arguments.null, Some(1 << 30));
    assert!(other.arguments.device_options().discard);
    assert_eq!(root.lines.of(None), 5);
    assert_eq!(root.lines.of(Some("blk-file")), 7);
    assert_eq!(root.lines.of(Some("serial")), 5, "not there: the table");
    assert_eq!(other.lines.of(Some("null")), 15);
}

#[test]
fn mistakes_are_told_by_their_line() {
    for (text, line, parts) in [
        (
            EXAMPLE,
            16,
            &["discard", "no such option", "no-discard"][..],
        ),
        ("[[device]]\nnull = \n", 2, &["no TOML"]),
        (
            "[[device]]\nnull = '1M'\nnull = '2M'\n",
            3,
            &["no TOML", "duplicate"],
        ),
        ("", 1, &["no device", "[[device]]"]),
        ("verbose = 1\n", 1, &["no device"]),
        ("\nblk-file = '/a'\n", 2, &["blk-file", "[[device]] above"]),
        (
            "typo = 1\n[[device]]\nnull = '1M'\n",
            1,
            &["typo", "exit-on-disconnect"],
        ),
        ("[device]\nnull = '1M'\n", 1, &["[[device]]"]),
        ("device = [1]\n", 1, &["[[device]]"]),
        (
            "[[device]]\n\nnum-queues = 0\n",
            3,
            &["num-queues", "1..=256"],
        ),
        ("[[device]]\n\nnum-queues = -3\n", 3, &["-3", "1..=256"]),
        (
            "[[device]]\nnum-queues = 1.5\n",
            2,
            &["num-queues", "whole number"],
        ),
        (
            "[[device]]\nnum-queues = [1, 2]\n",
            2,
            &["num-queues", "no list"],
        ),
        (
            "[[device]]\nblk-file = ['/a', '/b']\n",
            2,
            &["blk-file", "no list"],
        ),
        (
            "[[device]]\ncpu-affinity = [[1]]\n",
            2,
            &["cpu-affinity", "a list of such"],
        ),
        (
            "[[device]]\nread-only = 'maybe'\n",
            2,
            &["read-only", "on or off"],
        ),
        ("[[device]]\nserial = true\n", 2, &["serial"]),
        (
            "[[device]]\nserial = 1979-05-27\n",
            2,
            &["serial", "a string"],
        ),
        (
            "[[device]]\nnull = '1M'\n[device.x]\ny = 1\n",
            3,
            &["x", "a string"],
        ),
        (
            "[[device]]\nnull = '1M'\nblk-file = '/a'\n",
            3,
            &["--blk-file", "--null"],
        ),
    ] {
        let wrong = parse(text).unwrap_err();
        for part in parts {
            assert!(wrong.why.contains(part), "{text:?}: {part:?}: {wrong:?}");
        }
        assert_eq!(wrong.line, line, "{text:?}: {wrong:?}");
    }
}
