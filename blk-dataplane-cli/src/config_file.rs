//! The file of `--config`: TOML, a `[[device]]` table for each device, the program's own options above them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use crate::Failure;
use crate::arguments::ProgramArguments;
use crate::device_arguments::DeviceArguments;
use crate::settings::{self, Refused, Value};

/// What a file asks for.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) program: ProgramArguments,
    pub(crate) devices: Vec<Described>,
}

/// A device, and where in the file it is.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) arguments: DeviceArguments,
    pub(crate) lines: Lines,
}

/// Line numbers of a table and of its keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    table: usize,
    keys: BTreeMap<String, usize>,
}

impl Lines {
    /// Where `key` is, or else its table.
    pub(crate) fn of(&self, key: Option<&str>) -> usize {
        key.and_then(|key| self.keys.get(key))
            .copied()
            .unwrap_or(self.table)
    }
}

/// What is wrong in a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    line: usize,
    why: String,
}

/// Reads the file.
pub(crate) fn read(path: &Path) -> Result<Configuration, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = |remedy| format!("--config: {}: {error}; {remedy}", path.display());
        match error.kind() {
            std::io::ErrorKind::NotFound => Failure::usage(message("give a TOML file")),
            std::io::ErrorKind::InvalidData | std::io::ErrorKind::IsADirectory => {
                Failure::usage(message("give a TOML file, which is UTF-8 text"))
            }
            _ => Failure::host(message("check that this user may read it")),
        }
    })?;
    parse(&text).map_err(|Wrong { line, why }| {
        Failure::usage(format!("--config: {}:{line}: {why}", path.display()))
    })
}

/// Makes line numbers of places in a text.
struct Text<'a>(&'a str);

impl Text<'_> {
    fn line(&self, at: &Range<usize>) -> usize {
        let before = self.0.as_bytes().iter().take(at.start);
        1 + before.filter(|&&byte| byte == b'\n').count()
    }
}

pub(crate) fn parse(text: &str) -> Result<Configuration, Wrong> {
    let source = Text(text);
    let document = DeTable::parse(text).map_err(|error| Wrong {
        line: error.span().map_or(1, |span| source.line(&span)),
        why: format!("this is no TOML: {}", error.message()),
    })?;
    let (mut top, mut devices) = (Vec::new(), Vec::new());
    for (key, value) in document.get_ref() {
        if key.get_ref() == "device" {
            devices = tables(&source, value)?;
        } else {
            top.push((key, value));
        }
    }
    let (lines, settings) = settings_of(&source, 1, top)?;
    let program = settings::program(&settings).map_err(|refused| {
        let why = match &refused.key {
            // A file of one device, written without a table's head: the commonest mistake.
            Some(key) if is_option_of_a_device(key) => {
                format!("{key}: belongs to a device; write [[device]] above it")
            }
            _ => refused.why.clone(),
        };
        wrong(&lines, &Refused { why, ..refused })
    })?;
    if devices.is_empty() {
        return Err(Wrong {
            line: 1,
            why: "there is no device; begin one with [[device]]".into(),
        });
    }
    Ok(Configuration { program, devices })
}

fn is_option_of_a_device(key: &str) -> bool {
    use clap::CommandFactory;
    crate::arguments::Arguments::command()
        .get_arguments()
        .any(|option| option.get_long() == Some(key))
}

fn tables(source: &Text<'_>, value: &Spanned<DeValue<'_>>) -> Result<Vec<Described>, Wrong> {
    let wrong_type = |span: &Range<usize>| Wrong {
        line: source.line(span),
        why: "device: begin each device with [[device]]".into(),
    };
    let DeValue::Array(array) = value.get_ref() else {
        return Err(wrong_type(&value.span()));
    };
    let mut devices = Vec::new();
    for item in array.iter() {
        let DeValue::Table(table) = item.get_ref() else {
            return Err(wrong_type(&item.span()));
        };
        let (lines, settings) = settings_of(source, source.line(&item.span()), table)?;
        let arguments = settings::device(&settings).map_err(|refused| wrong(&lines, &refused))?;
        devices.push(Described { arguments, lines });
    }
    Ok(devices)
}

fn wrong(lines: &Lines, refused: &Refused) -> Wrong {
    Wrong {
        line: lines.of(refused.key.as_deref()),
        why: refused.why.clone(),
    }
}

type Entry<'a, 'i> = (
    &'a Spanned<std::borrow::Cow<'i, str>>,
    &'a Spanned<DeValue<'i>>,
);

/// The settings of a table, whose head is in line `table`.
fn settings_of<'a, 'i: 'a>(
    source: &Text<'_>,
    table: usize,
    entries: impl IntoIterator<Item = Entry<'a, 'i>>,
) -> Result<(Lines, Vec<(String, Value)>), Wrong> {
    let mut lines = Lines {
        table,
        keys: BTreeMap::new(),
    };
    let mut settings = Vec::new();
    for (key, value) in entries {
        let name = key.get_ref().to_string();
        let line = source.line(&key.span());
        let value = value_of(value.get_ref()).ok_or_else(|| Wrong {
            line,
            why: format!(
                "{name}: write a string, a whole number, true or false, or a list of such"
            ),
        })?;
        lines.keys.insert(name.clone(), line);
        settings.push((name, value));
    }
    Ok((lines, settings))
}

fn value_of(value: &DeValue<'_>) -> Option<Value> {
    match value {
        DeValue::Boolean(on) => Some(Value::Switch(*on)),
        DeValue::Array(array) => array
            .iter()
            .map(|item| text_of(item.get_ref()).map(Into::into))
            .collect::<Option<_>>()
            .map(Value::List),
        value => text_of(value).map(|text| Value::Text(text.into())),
    }
}

fn text_of(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(integer) => decimal(integer),
        _ => None,
    }
}

/// TOML's integers have 64 bits.
fn decimal(integer: &DeInteger<'_>) -> Option<String> {
    i64::from_str_radix(integer.as_str(), integer.radix())
        .ok()
        .map(|number| number.to_string())
}

#[cfg(test)]
mod tests;
