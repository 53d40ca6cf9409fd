//! What every guest test starts from: the machine to itself, what guests boot from, a directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tempfile::TempDir;

/// One guest at a time: each runs two emulated CPUs, which is all a small CI machine has.
static ONE_GUEST: Mutex<()> = Mutex::new(());

/// Files a guest boots from, made by `ci/guest-assets.sh`.
#[derive(Debug)]
pub(crate) struct Assets {
    pub(crate) kernel: PathBuf,
    pub(crate) base_archive: PathBuf,
    pub(crate) fio_archive: PathBuf,
}

/// The right to run guests, and a directory that goes with the test.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) assets: &'static Assets,
    directory: TempDir,
    _one_guest: MutexGuard<'static, ()>,
}

impl Lab {
    /// Waits for other guest tests of this process to end.
    pub(crate) fn enter() -> Self {
        // A test that failed leaves nothing behind that could disturb the next.
        let one_guest = ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            assets: assets(),
            directory: TempDir::with_prefix("blk-dataplane-guest-").unwrap(),
            _one_guest: one_guest,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// A path as an argument; those of a lab are plain ASCII.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn sha256(path: &Path) -> String {
    let output = run_script(Command::new("sha256sum").arg(path));
    output.split_whitespace().next().unwrap().to_owned()
}

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub(crate) fn target_directory() -> &'static Path {
    // Cargo's directory for test files is tmp/ in the target directory.
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

fn assets() -> &'static Assets {
    static ASSETS: OnceLock<Assets> = OnceLock::new();
    ASSETS.get_or_init(|| {
        let directory = target_directory().join("guest");
        run_script(&mut Command::new(
            repository().join("ci/install-test-deps.sh"),
        ));
        run_script(Command::new(repository().join("ci/guest-assets.sh")).arg(&directory));
        Assets {
            kernel: directory.join("vmlinuz"),
            base_archive: directory.join("base.cpio"),
            fio_archive: directory.join("fio.cpio"),
        }
    })
}

/// Runs a command that must succeed, and returns what it wrote on stdout.
pub(crate) fn run_script(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}
