//! The archive format of an initramfs, as far as one small file needs it.

/// An archive of the single regular file `name`, to follow another archive.
///
/// Format "newc" of cpio(5): a header of fourteen numbers in eight hex digits each, the name, the
/// contents, each padded to four bytes.
pub(crate) fn archive_of(name: &str, contents: &[u8]) -> Vec<u8> {
    const REGULAR_EXECUTABLE: usize = 0o100_755;
    let mut archive = Vec::new();
    entry(&mut archive, name, REGULAR_EXECUTABLE, contents);
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: usize, contents: &[u8]) {
    let name_size = name.len() + 1;
    // inode, mode, uid, gid, links, mtime, file size, four device numbers, name size, checksum
    let numbers = [
        0,
        mode,
        0,
        0,
        1,
        0,
        contents.len(),
        0,
        0,
        0,
        0,
        name_size,
        0,
    ];
    archive.extend(b"070701");
    for number in numbers {
        archive.extend(format!("{number:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    pad(archive);
    archive.extend(contents);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
