//! Names of devices.

/// Longest name: it is printed before whatever is said of the device.
const LEN_MAX: usize = 64;

/// A name that is safe to print and can be one of systemd's, which take no colon.
pub(crate) fn parse_name(text: &str) -> Result<String, String> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if text.is_empty() || text.len() > LEN_MAX || !text.bytes().all(known) {
        return Err(format!(
            "{text:?} is no name; give up to {LEN_MAX} letters, digits, dots, dashes and underscores"
        ));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_harmless_characters() {
        for name in ["a", "root", "vm-7.root_disk", "0", &"x".repeat(64)] {
            assert_eq!(parse_name(name).as_deref(), Ok(name));
        }
        for text in ["", "a b", "a:b", "a,b", "ä", "a\n", "/", &"x".repeat(65)] {
            assert!(parse_name(text).is_err(), "{text:?}");
        }
    }
}
