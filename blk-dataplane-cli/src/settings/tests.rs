use super::*;

fn text(text: &str) -> Value {
    Value::Text(text.into())
}

fn pairs(line: &str) -> Vec<(String, Value)> {
    split(&OsString::from(line)).unwrap()
}

#[test]
fn keys_and_values_are_split_as_qemu_does() {
    let expected = |pairs: &[(&str, Value)]| -> Vec<(String, Value)> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()))
            .collect()
    };
    assert_eq!(
        pairs("blk-file=/a,serial=x=y"),
        expected(&[("blk-file", text("/a")), ("serial", text("x=y"))])
    );
    // A comma, two commas, a comma at the end of a value.
    assert_eq!(
        pairs("blk-file=/a,,b,,,,c,,,null=1"),
        expected(&[("blk-file", text("/a,b,,c,")), ("null", text("1"))])
    );
    assert_eq!(
        pairs("read-only,serial=,"),
        expected(&[("read-only", Value::Switch(true)), ("serial", text(""))])
    );
    for nothing in ["", ",a=1", "a=1,=2", "="] {
        assert!(split(&OsString::from(nothing)).is_err(), "{nothing:?}");
    }
}

#[test]
fn paths_need_not_be_text() {
    use std::os::unix::ffi::OsStringExt;
    let line = OsString::from_vec(b"blk-file=/a\xff,,b".to_vec());
    let arguments = device(&split(&line).unwrap()).unwrap();
    let path = arguments.blk_file.unwrap().into_os_string().into_vec();
    assert_eq!(path, b"/a\xff,b");
}

/// A value for every option of a device, so that one which cannot be given this way is found.
#[test]
fn every_option_of_a_device_is_understood_as_the_flag_is() {
    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Flags {
        #[command(flatten)]
        options: DeviceArguments,
    }
    let command = Only::<DeviceArguments>::command();
    let mut tried = 0;
    for option in command.get_arguments() {
        let key = option.get_long().unwrap();
        let name = match option.get_action() {
            ArgAction::SetTrue => None,
            _ => option.get_value_names().and_then(|names| names.first()),
        };
        let value = match name.map(clap::builder::Str::as_str) {
            None => "on",
            Some("PATH") => "/x",
            Some("SIZE") => "1M",
            Some("FDNUM" | "N") => "4",
            Some("BYTES") => "4096",
            Some("ENGINE") => "io_uring",
            Some("LIST") => "0,,1",
            Some("TEXT" | "NAME" | "GROUP") => "x",
            Some(other) => panic!("{key}: no value for {other} in this test"),
        };
        let flag = match value {
            "on" => format!("--{key}"),
            value => format!("--{key}={}", value.replace(",,", ",")),
        };
        let from_flag = Flags::try_parse_from([&flag]).unwrap().options;
        let from_pair = device(&pairs(&format!("{key}={value}"))).unwrap();
        assert_eq!(format!("{from_flag:?}"), format!("{from_pair:?}"), "{key}");
        let nothing = device(&[]).unwrap();
        assert_ne!(format!("{from_flag:?}"), format!("{nothing:?}"), "{key}");
        tried += 1;
    }
    assert!(tried > 15, "{tried}");
}

#[test]
fn switches_are_on_or_off() {
    let read_only = |line: &str| device(&pairs(line)).map(|arguments| arguments.read_only);
    for on in [
        "read-only",
        "read-only=on",
        "read-only=true",
        "read-only=yes",
    ] {
        assert_eq!(read_only(on), Ok(true), "{on}");
    }
    for off in [
        "null=1M",
        "read-only=off",
        "read-only=false",
        "read-only=no",
    ] {
        assert_eq!(read_only(off), Ok(false), "{off}");
    }
    let refused = read_only("read-only=1").unwrap_err();
    assert_eq!(refused.key.as_deref(), Some("read-only"));
}

#[test]
fn what_is_refused_names_the_key_and_what_would_do() {
    for (line, key, parts) in [
        (
            "blk-fil=x",
            "blk-fil",
            &["no such option", "blk-file", "null"][..],
        ),
        // A path whose comma was not doubled.
        ("blk-file=/a,b.img", "b.img", &["comma", "twice"]),
        ("null=1M,null=2M", "null", &["twice"]),
        ("num-queues=0", "num-queues", &["0", "1..=256"]),
        ("num-queues=-1", "num-queues", &["1..=256"]),
        ("cpu-affinity=5-1", "cpu-affinity", &["5-1", "0,2,4-7"]),
        ("serial", "serial", &["serial=VALUE"]),
        ("null=1Q", "null", &["1Q", "512M"]),
        ("help=on", "help", &["no such option"]),
    ] {
        let refused = device(&pairs(line)).unwrap_err();
        assert_eq!(refused.key.as_deref(), Some(key), "{line}: {refused:?}");
        for part in parts {
            assert!(refused.why.contains(part), "{line}: {part}: {refused:?}");
        }
        assert!(!refused.why.contains('\n'), "{refused:?}");
        assert!(!refused.why.starts_with("error"), "{refused:?}");
    }
}

#[test]
fn the_programs_own_options_are_told_from_a_devices() {
    let setting = |key: &str, value| vec![(key.to_owned(), value)];
    let exit = program(&setting("exit-on-disconnect", Value::Switch(true))).unwrap();
    assert!(exit.exit_on_disconnect);
    assert_eq!(program(&setting("verbose", text("2"))).unwrap().verbose, 2);
    assert!(program(&setting("verbose", text("4"))).is_err());
    assert!(program(&setting("blk-file", text("/a"))).is_err());
    assert!(device(&setting("verbose", text("1"))).is_err());
}
