//! Sizes as people write them.

/// Parses bytes with an optional binary suffix: `K`, `M`, `G`, `T`, `P`, `E`, as in QEMU and truncate(1), with
/// or without a final `iB` or `B`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let suffix = suffix.to_ascii_lowercase();
    let unit = suffix
        .strip_suffix("ib")
        .or_else(|| suffix.strip_suffix('b'))
        .unwrap_or(&suffix);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(format!("{text:?} is no size; write one like 512M or 1G")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no size; write one like 512M or 1G"))?;
    let size = number
        .checked_mul(1 << shift)
        // A file's size is signed.
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| format!("{text} is more than a file can hold"))?;
    if size < 512 {
        return Err(format!("{text} is less than one sector of 512 bytes"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary() {
        assert_eq!(parse_size("1024"), Ok(1024));
        assert_eq!(parse_size("64k"), Ok(64 << 10));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("2TiB"), Ok(2 << 40));
        assert_eq!(parse_size("3P"), Ok(3 << 50));
        assert_eq!(parse_size("7E"), Ok(7 << 60));
        assert_eq!(parse_size("1gb"), Ok(1 << 30));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "G",
            "1X",
            "1.5G",
            "-1",
            "1 G",
            "0",
            "511",
            "99999999T",
            "8E",
            "iB",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
