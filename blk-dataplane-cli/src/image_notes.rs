//! What an operator may not expect of an image, though it can be served.

use std::fs::File;
use std::os::unix::fs::FileExt;

use blk_dataplane::{Caching, Image};

/// A sentence each, without the image's name. `wanted`: the size given to `--create`, if the image was there
/// already.
pub(crate) fn about(image: &Image, wanted: Option<u64>) -> Vec<String> {
    let mut notes = Vec::new();
    // An image that has just been opened says its size.
    let size = image.current_size().unwrap_or_else(|_| image.capacity());
    if let Some(wanted) = wanted.filter(|&wanted| wanted != size) {
        notes.push(format!(
            "it is there already, and stays as it is: {size} bytes, where --create says {wanted}; \
             truncate -s makes it another size"
        ));
    }
    let tail = size.saturating_sub(image.capacity());
    if tail > 0 {
        notes.push(format!(
            "its last {tail} bytes are no whole block of {} and not part of the disk",
            image.block_size()
        ));
    }
    if let Caching::Buffered(reason) = image.caching() {
        notes.push(format!("using the page cache: {reason}"));
    }
    if looks_like_qcow2(image) {
        notes.push(
            "this looks like a QCOW2 image, and is served as it is, as a raw one; convert it with \
             qemu-img convert -O raw"
                .to_owned(),
        );
    }
    notes
}

/// Whether an image begins as the commonest format that is not raw. Only good for a warning: a guest can write
/// the same into a raw one.
fn looks_like_qcow2(image: &Image) -> bool {
    // Read through the page cache: direct I/O would want an aligned buffer.
    let mut magic = [0; 4];
    File::open(image.path()).is_ok_and(|file| file.read_exact_at(&mut magic, 0).is_ok())
        && magic == *b"QFI\xfb"
}
