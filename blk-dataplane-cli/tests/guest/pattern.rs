//! Data that guest and host make independently of each other.

/// What `pattern TAG COUNT` writes in the guest (prelude.sh): records of 16 bytes that tell where they belong.
pub(crate) fn pattern(tag: &str, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * RECORD);
    for index in 0..count {
        bytes.extend(format!("{tag:<4}:{index:010}\n").bytes());
    }
    assert_eq!(bytes.len(), count * RECORD, "a tag has up to four letters");
    bytes
}

pub(crate) const RECORD: usize = 16;

/// Asserts that both are the same, naming the first difference instead of printing both.
pub(crate) fn assert_same_bytes(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: length");
    if let Some(offset) = found.iter().zip(wanted).position(|(a, b)| a != b) {
        let around = |bytes: &[u8]| {
            let start = offset - offset % RECORD;
            String::from_utf8_lossy(&bytes[start..bytes.len().min(start + 2 * RECORD)]).into_owned()
        };
        panic!(
            "{what}: first difference at offset {offset}: found {:?}, wanted {:?}",
            around(found),
            around(wanted)
        );
    }
}
