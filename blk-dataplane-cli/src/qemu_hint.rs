//! The QEMU arguments that attach the device.

use std::fmt::Write;
use std::path::Path;

use blk_dataplane::Device;

/// Lines to add to a QEMU command line. Guest memory that is not shared is the commonest mistake: the
/// guest then boots and the disk never answers.
pub(crate) fn attach(socket: &Path, device: &Device) -> String {
    // In QEMU's option syntax a comma in a value is doubled; the quotes are for the shell.
    let path = socket.display().to_string().replace(',', ",,");
    let path = path.replace('\'', r"'\''");
    let mut text = String::from(
        "Attach it with these QEMU arguments. The memory must be shared (share=on), and its size\n\
         the same as -m:\n",
    );
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "  -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\"
    );
    let _ = writeln!(text, "  -machine q35,memory-backend=mem \\");
    let _ = writeln!(text, "  -chardev 'socket,id=blk0,path={path}' \\");
    let _ = writeln!(text, "  -device vhost-user-blk-pci,chardev=blk0");
    let _ = writeln!(
        text,
        "(one queue per CPU of the guest, up to {}; read-only: {})",
        device.num_queues(),
        if device.is_read_only() { "yes" } else { "no" },
    );
    text
}
