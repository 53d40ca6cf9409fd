//! Options given as keys and values, by `--device` or a configuration file, parsed as the flags of the same names:
//! one list of options, one set of checks, whichever way they come.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Args, CommandFactory, FromArgMatches, Parser};

use crate::arguments::ProgramArguments;
use crate::device_arguments::DeviceArguments;

/// A value, of the types that options have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// What would follow the flag's `=`.
    Text(OsString),
    /// True or false; for a flag that takes no value.
    Switch(bool),
    /// Several; for an option that takes a list.
    List(Vec<OsString>),
}

/// Why settings were refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The key at fault, where it is one.
    pub(crate) key: Option<String>,
    /// What is wrong and what to do.
    pub(crate) why: String,
}

/// The options of a device.
pub(crate) fn device(settings: &[(String, Value)]) -> Result<DeviceArguments, Refused> {
    parse::<DeviceArguments>(settings)
}

/// The options of the program.
pub(crate) fn program(settings: &[(String, Value)]) -> Result<ProgramArguments, Refused> {
    parse::<ProgramArguments>(settings)
}

/// Nothing but the options of `A`.
#[derive(Debug, Parser)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
struct Only<A: Args> {
    #[command(flatten)]
    options: A,
}

fn parse<A: Args>(settings: &[(String, Value)]) -> Result<A, Refused> {
    let command = Only::<A>::command();
    let mut flags = Vec::new();
    for (index, (key, value)) in settings.iter().enumerate() {
        let refused = |why: String| Refused {
            key: Some(key.clone()),
            why: format!("{key}: {why}"),
        };
        let option = command
            .get_arguments()
            .find(|option| option.get_long() == Some(key))
            .ok_or_else(|| refused(unknown(command.get_arguments(), value)))?;
        if settings[..index].iter().any(|(earlier, _)| earlier == key) {
            return Err(refused("given twice".into()));
        }
        add_flags(option, key, value, &mut flags).map_err(refused)?;
    }
    command
        .try_get_matches_from(flags)
        .and_then(|matches| Only::<A>::from_arg_matches(&matches))
        .map(|only| only.options)
        .map_err(|error| explain(&error))
}

/// The flags that say the same as `key = value`.
fn add_flags(
    option: &Arg,
    key: &str,
    value: &Value,
    flags: &mut Vec<OsString>,
) -> Result<(), String> {
    let flag = || OsString::from(format!("--{key}"));
    let with = |value: &OsString| {
        let mut flag = flag();
        flag.push("=");
        flag.push(value);
        flag
    };
    match (option.get_action(), value) {
        (ArgAction::SetTrue, value) => {
            if switch(value).ok_or("write on or off, true or false")? {
                flags.push(flag());
            }
        }
        (ArgAction::Count, Value::Text(text)) => {
            let times: usize = text
                .to_str()
                .and_then(|text| text.parse().ok())
                .filter(|&times| times <= COUNT_MAX)
                .ok_or_else(|| format!("write a number from 0 to {COUNT_MAX}"))?;
            flags.extend((0..times).map(|_| flag()));
        }
        (_, Value::Text(text)) => flags.push(with(text)),
        (_, Value::List(list)) if takes_list(option) => {
            flags.push(with(&list.join(std::ffi::OsStr::new(","))));
        }
        (_, Value::List(_)) => return Err("takes one value and no list".into()),
        (_, Value::Switch(_)) => return Err(format!("write {key}=VALUE")),
    }
    Ok(())
}

/// How often a flag may be repeated that counts: it means no more after three.
const COUNT_MAX: usize = 3;

fn takes_list(option: &Arg) -> bool {
    option
        .get_value_names()
        .is_some_and(|names| names.iter().any(|name| name == "LIST"))
}

fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Switch(on) => Some(*on),
        Value::Text(text) => match text.as_bytes() {
            b"on" | b"true" | b"yes" => Some(true),
            b"off" | b"false" | b"no" => Some(false),
            _ => None,
        },
        Value::List(_) => None,
    }
}

fn unknown<'a>(known: impl Iterator<Item = &'a Arg>, value: &Value) -> String {
    let known: Vec<_> = known.filter_map(Arg::get_long).collect();
    // The rest of a path, most likely.
    let hint = match value {
        Value::Switch(true) => "; a comma in a value of --device is written twice",
        _ => "",
    };
    format!(
        "there is no such option; there are {}{hint}",
        known.join(", ")
    )
}

/// The first paragraph of what clap says; what follows is about the command line.
fn explain(error: &clap::Error) -> Refused {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or(&text);
    let words: Vec<_> = paragraph.split_whitespace().collect();
    let why = words.join(" ");
    let key = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => flag
            .trim_start_matches('-')
            .split([' ', '='])
            .next()
            .map(str::to_owned),
        _ => None,
    };
    Refused {
        key,
        why: why.strip_prefix("error: ").unwrap_or(&why).to_owned(),
    }
}

/// Splits the value of `--device` as QEMU does: `key=value` with commas between, and two commas for one in a value.
/// A key alone is one that is on.
pub(crate) fn split(text: &OsString) -> Result<Vec<(String, Value)>, Refused> {
    let (mut parts, mut part) = (Vec::new(), Vec::new());
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(std::mem::take(&mut part));
        } else {
            part.push(byte);
        }
    }
    // One comma at the end begins no further setting.
    if !part.is_empty() || parts.is_empty() {
        parts.push(part);
    }
    parts.iter().map(|part| setting(part)).collect()
}

fn setting(part: &[u8]) -> Result<(String, Value), Refused> {
    let (key, value) = match part.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let value = std::ffi::OsStr::from_bytes(&part[at + 1..]);
            (&part[..at], Value::Text(value.to_owned()))
        }
        None => (part, Value::Switch(true)),
    };
    let key = String::from_utf8_lossy(key).into_owned();
    if key.is_empty() {
        return Err(Refused {
            key: None,
            why: "an option is missing; write key=value with commas between".into(),
        });
    }
    Ok((key, value))
}

#[cfg(test)]
mod tests;
