//! Where a device was described, for whoever has to mend it.

use std::path::PathBuf;

use crate::config_file::Lines;
use crate::failure::Failure;

/// Where a device was described.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// By flags: there is one device.
    Flags,
    /// By the `--device` of this number, counted from 1.
    Device(usize),
    /// In a configuration file.
    File { path: PathBuf, lines: Lines },
}

impl Origin {
    /// The same failure, with the place of the option that it begins with.
    pub(crate) fn place(&self, failure: Failure) -> Failure {
        let place = match self {
            Self::Flags => return failure,
            Self::Device(number) => format!("--device number {number}"),
            Self::File { path, lines } => {
                let line = lines.of(option_named_by(&failure.message));
                format!("--config: {}:{line}", path.display())
            }
        };
        Failure {
            message: format!("{place}: {}", failure.message),
            ..failure
        }
    }
}

/// `blk-file` of `--blk-file: there is none`.
fn option_named_by(message: &str) -> Option<&str> {
    message.strip_prefix("--")?.split([':', '=', ' ']).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_begin_with_the_option_at_fault() {
        assert_eq!(
            option_named_by("--blk-file: none: no such file"),
            Some("blk-file")
        );
        assert_eq!(option_named_by("--fd=7: not open"), Some("fd"));
        assert_eq!(option_named_by("the device cannot start"), None);
    }

    #[test]
    fn flags_need_no_place_and_numbers_begin_with_one() {
        let failure = || Failure::usage("--serial: too long");
        assert_eq!(Origin::Flags.place(failure()).message, "--serial: too long");
        assert_eq!(
            Origin::Device(2).place(failure()).message,
            "--device number 2: --serial: too long"
        );
    }
}
