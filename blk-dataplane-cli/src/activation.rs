//! Socket activation: listening sockets that systemd, or whoever speaks its protocol, has opened for the devices
//! (`sd_listen_fds(3)`).

use std::os::fd::{OwnedFd, RawFd};

use crate::device_arguments::DeviceArguments;
use crate::{Failure, inherited_fd};

/// The first descriptor passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// A socket that was passed, and its name if it has one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed<F> {
    pub(crate) socket: F,
    name: Option<String>,
}

/// The three variables of the protocol.
#[derive(Clone, Copy, Debug, Default)]
struct Variables<'a> {
    pid: Option<&'a str>,
    fds: Option<&'a str>,
    names: Option<&'a str>,
}

/// Takes the sockets that were passed to this process; none if there are none.
pub(crate) fn take() -> Result<Vec<Passed<OwnedFd>>, Failure> {
    let variable = |name| std::env::var(name).ok();
    let (pid, fds, names) = (
        variable("LISTEN_PID"),
        variable("LISTEN_FDS"),
        variable("LISTEN_FDNAMES"),
    );
    let variables = Variables {
        pid: pid.as_deref(),
        fds: fds.as_deref(),
        names: names.as_deref(),
    };
    let passed = passed(variables, std::process::id())?;
    passed
        .into_iter()
        .map(|Passed { socket, name }| {
            let socket = inherited_fd::take(socket).map_err(|error| {
                Failure::usage(format!(
                    "LISTEN_FDS: descriptor {socket}: {error}; whoever started the program must pass it"
                ))
            })?;
            Ok(Passed { socket, name })
        })
        .collect()
}

/// What the variables say was passed to process `own_pid`.
fn passed(variables: Variables<'_>, own_pid: u32) -> Result<Vec<Passed<RawFd>>, Failure> {
    // Without a number of ours the variables are another process's, inherited.
    if variables.pid.and_then(|pid| pid.parse().ok()) != Some(own_pid) {
        return Ok(Vec::new());
    }
    let Some(fds) = variables.fds else {
        return Ok(Vec::new());
    };
    let count: RawFd = fds
        .parse()
        .ok()
        .filter(|&count| (0..=RawFd::MAX - FIRST).contains(&count))
        .ok_or_else(|| Failure::usage(format!("LISTEN_FDS: {fds:?} is no number of sockets")))?;
    let names: Vec<_> = variables
        .names
        .map_or_else(Vec::new, |names| names.split(':').collect());
    if !names.is_empty() && i32::try_from(names.len()) != Ok(count) {
        return Err(Failure::usage(format!(
            "LISTEN_FDNAMES: {} names for {count} sockets",
            names.len()
        )));
    }
    let mut names = names.into_iter();
    Ok((FIRST..FIRST + count)
        .map(|socket| Passed {
            socket,
            name: names.next().map(str::to_owned),
        })
        .collect())
}

/// Gives each device that has no socket of its own the one that was passed for it. One of one goes without saying.
/// Of several, those with names of their own go to the devices of these names: their order is systemd's, and a guest
/// must not be given another's disk. Those that are all called the same, as several of one socket unit are, go
/// in their order.
pub(crate) fn assign<F>(
    passed: Vec<Passed<F>>,
    devices: &[&DeviceArguments],
) -> Result<Vec<Option<F>>, Failure> {
    if passed.is_empty() {
        return Ok(devices.iter().map(|_| None).collect());
    }
    let wanting = devices.iter().filter(|device| device.wants_a_socket());
    let wanting = wanting.count();
    if passed.len() != wanting {
        return Err(Failure::usage(format!(
            "LISTEN_FDS: {} sockets were passed, and {wanting} devices have neither --socket-path nor --fd; \
             describe a device for each socket, or leave out the socket unit",
            passed.len()
        )));
    }
    let by_name = passed.len() > 1
        && passed[1..]
            .iter()
            .any(|socket| socket.name != passed[0].name);
    let mut passed = passed;
    devices
        .iter()
        .map(|device| {
            if !device.wants_a_socket() {
                return Ok(None);
            }
            let place = match by_name {
                true => place_of(device.name.as_deref(), &passed)?,
                false => 0,
            };
            Ok(Some(passed.remove(place).socket))
        })
        .collect()
}

fn place_of<F>(name: Option<&str>, passed: &[Passed<F>]) -> Result<usize, Failure> {
    let place = passed
        .iter()
        .position(|socket| name.is_some() && socket.name.as_deref() == name);
    place.ok_or_else(|| {
        let names: Vec<_> = passed
            .iter()
            .filter_map(|socket| socket.name.as_deref())
            .collect();
        Failure::usage(format!(
            "--name: {}; there are sockets for {} (FileDescriptorName= in the socket unit)",
            match name {
                Some(name) => format!("no socket was passed for {name}"),
                None => "a device without a name cannot tell which socket is its own".into(),
            },
            names.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::settings;

    fn variables<'a>(pid: &'a str, fds: &'a str, names: Option<&'a str>) -> Variables<'a> {
        Variables {
            pid: Some(pid),
            fds: Some(fds),
            names,
        }
    }

    #[test]
    fn sockets_count_from_3_and_are_for_the_process_that_is_named() {
        let own = |fds, names| passed(variables("7", fds, names), 7);
        let expected = |names: &[Option<&str>]| -> Vec<_> {
            (3..)
                .zip(names)
                .map(|(socket, name)| Passed {
                    socket,
                    name: name.map(str::to_owned),
                })
                .collect()
        };
        assert_eq!(own("2", None).unwrap(), expected(&[None, None]));
        assert_eq!(
            own("2", Some("a:b")).unwrap(),
            expected(&[Some("a"), Some("b")])
        );
        assert_eq!(own("0", None).unwrap(), []);
        // Inherited from a process that was meant.
        assert_eq!(passed(variables("8", "2", None), 7).unwrap(), []);
        assert_eq!(passed(Variables::default(), 7).unwrap(), []);
        for (fds, names) in [
            ("x", None),
            ("-1", None),
            ("2147483647", None),
            ("2", Some("a")),
        ] {
            assert!(own(fds, names).is_err(), "{fds} {names:?}");
        }
    }

    fn devices(texts: &[&str]) -> Vec<DeviceArguments> {
        let parse = |text: &&str| {
            let pairs = settings::split(&OsString::from(text)).unwrap();
            settings::device(&pairs).unwrap()
        };
        texts.iter().map(parse).collect()
    }

    fn assigned(texts: &[&str], names: &[&str]) -> Result<Vec<Option<usize>>, Failure> {
        let devices = devices(texts);
        let passed = names.iter().enumerate().map(|(socket, name)| Passed {
            socket,
            name: Some((*name).to_owned()),
        });
        assign(passed.collect(), &devices.iter().collect::<Vec<_>>())
    }

    #[test]
    fn sockets_with_names_go_by_name_and_others_in_order() {
        let named = ["null=1M,name=a", "null=1M,name=b"];
        assert_eq!(
            assigned(&named, &["b", "a"]).unwrap(),
            [Some(1), Some(0)],
            "by name"
        );
        assert_eq!(
            assigned(&named, &["s", "s"]).unwrap(),
            [Some(0), Some(1)],
            "in order"
        );
        assert_eq!(assigned(&["null=1M"], &["s"]).unwrap(), [Some(0)]);
        assert_eq!(assigned(&["null=1M,name=a"], &["s"]).unwrap(), [Some(0)]);
        let one_of_two = ["null=1M,socket-path=/s", "null=1M"];
        assert_eq!(assigned(&one_of_two, &["s"]).unwrap(), [None, Some(0)]);
        assert_eq!(assigned(&one_of_two, &[]).unwrap(), [None, None]);
    }

    #[test]
    fn a_socket_that_is_not_surely_a_devices_own_is_refused() {
        for (texts, names) in [
            // Too many, too few.
            (&["null=1M"][..], &["s", "s"][..]),
            (&["null=1M", "null=1M"], &["s"]),
            (&["null=1M,socket-path=/s"], &["s"]),
            // A name mistyped, and none at all.
            (&["null=1M,name=a", "null=1M,name=x"], &["a", "b"]),
            (&["null=1M", "null=1M"], &["a", "b"]),
            (&["null=1M,name=a", "null=1M,name=b"], &["x", "y"]),
        ] {
            assert!(assigned(texts, names).is_err(), "{texts:?} {names:?}");
        }
    }
}
