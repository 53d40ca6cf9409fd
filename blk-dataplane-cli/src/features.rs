//! Feature bits by name, for whoever reads what the program says.

use std::fmt::Write;

/// Bits that a device may offer (virtio 1.3 §5.2.3, §6).
const NAMES: [(u32, &str); 14] = [
    (2, "SEG_MAX"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (32, "VERSION_1"),
];

/// `0x…: NAME NAME`; a bit without a name by its number.
pub(crate) fn describe(features: u64) -> String {
    let mut text = format!("{features:#x}:");
    for bit in (0..u64::BITS).filter(|bit| features >> bit & 1 == 1) {
        // Writing to a String cannot fail.
        let _ = match NAMES.iter().find(|(number, _)| *number == bit) {
            Some((_, name)) => write!(text, " {name}"),
            None => write!(text, " bit{bit}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_go_by_their_names_and_unknown_ones_by_number() {
        assert_eq!(describe(0), "0x0:");
        let text = describe(1 << 2 | 1 << 9 | 1 << 32 | 1 << 63);
        assert_eq!(text, "0x8000000100000204: SEG_MAX FLUSH VERSION_1 bit63");
    }
}
