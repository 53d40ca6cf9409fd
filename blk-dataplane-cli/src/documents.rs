//! The documents of an operator, held to what the program takes.

use clap::Parser;

use crate::arguments::Arguments;
use crate::config_file;

/// The arguments of a unit's `ExecStart=`, for an instance called vm1.
fn exec_start(unit: &str) -> Vec<String> {
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let words = line.split(' ').map(|word| word.replace("%i", "vm1"));
    words.collect()
}

#[test]
fn units_start_the_program_with_options_that_there_are() {
    let service = include_str!("../../docs/systemd/blk-dataplane.service");
    let arguments = Arguments::try_parse_from(exec_start(service)).unwrap();
    let config = arguments.config.unwrap();
    assert_eq!(config.to_str(), Some("/etc/blk-dataplane.toml"));
    let service = include_str!("../../docs/systemd/blk-dataplane@.service");
    let arguments = Arguments::try_parse_from(exec_start(service)).unwrap();
    let image = arguments.device.blk_file.as_ref().unwrap();
    assert_eq!(image.to_str(), Some("/var/lib/blk-dataplane/vm1.img"));
    assert!(
        arguments.device.wants_a_socket(),
        "the socket unit passes one"
    );
    arguments.device.device_options().check().unwrap();
}

#[test]
fn example_configuration_is_one() {
    let text = include_str!("../../docs/systemd/blk-dataplane.toml");
    for text in [text.to_owned(), text.replace("\n#", "\n")] {
        // What is commented out is an example, too, but for the prose.
        let text: String = text
            .lines()
            .filter(|line| line.is_empty() || line.contains('=') || line.starts_with(['[', '#']))
            .map(|line| format!("{line}\n"))
            .collect();
        let configuration = config_file::parse(&text).unwrap();
        assert_eq!(configuration.devices.len(), 2);
        for device in configuration.devices {
            device.arguments.check().unwrap();
            device.arguments.device_options().check().unwrap();
        }
    }
}

/// `VhostUserBackend` of QEMU's docs/interop/vhost-user.json: three strings, and tags where there are any.
#[test]
fn description_for_management_software_has_what_its_schema_wants() {
    let text = include_str!("../../docs/vhost-user/50-blk-dataplane.json");
    let dense: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(
        dense,
        [
            "{",
            r#""description": "blk-dataplane vhost-user-blk","#,
            r#""type": "block","#,
            r#""binary": "/usr/bin/blk-dataplane""#,
            "}",
        ]
    );
}
