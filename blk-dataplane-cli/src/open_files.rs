//! The limit of open files.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one. The soft limit is 1024 for the sake of programs that use select(2), which
/// this one does not, and a device with many queues has some hundred descriptors of its front-end. Where that
/// is refused, the limit stays as it is.
pub(crate) fn raise_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
