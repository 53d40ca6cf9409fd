//! The QEMU arguments that attach the devices.

use std::fmt::Write;
use std::path::Path;

use crate::served::Named;

/// Lines to add to a QEMU command line. Guest memory that is not shared is the commonest mistake: the
/// guest then boots and the disk never answers.
pub(crate) fn attach<'a>(devices: impl Iterator<Item = (&'a Path, &'a Named)>) -> String {
    let mut text = String::new();
    for (index, (socket, named)) in devices.enumerate() {
        // Writing to a String cannot fail.
        if index == 0 {
            text.push_str(
                "Attach it with these QEMU arguments. The memory must be shared (share=on), and its size\n\
                 the same as -m:\n",
            );
            let _ = writeln!(
                text,
                "  -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\"
            );
            let _ = writeln!(text, "  -machine q35,memory-backend=mem \\");
        }
        // In QEMU's option syntax a comma in a value is doubled; the quotes are for the shell.
        let path = socket.display().to_string().replace(',', ",,");
        let path = path.replace('\'', r"'\''");
        let id = format!("blk{index}");
        let _ = writeln!(text, "  -chardev 'socket,id={id},path={path}' \\");
        let _ = writeln!(text, "  -device vhost-user-blk-pci,chardev={id}");
        let device = &named.device;
        let _ = writeln!(
            text,
            "({}one queue per CPU of the guest, up to {}; read-only: {})",
            named
                .name
                .as_ref()
                .map_or_else(String::new, |name| format!("{name}: ")),
            device.num_queues(),
            if device.is_read_only() { "yes" } else { "no" },
        );
    }
    text
}
