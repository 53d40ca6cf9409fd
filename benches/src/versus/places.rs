//! Where images and sockets are, and how commands name them.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::Arguments;
use super::rows::{Image, Row};
use crate::Error;

/// Bytes of a device that stores nothing.
pub(crate) const NULL_SIZE: u64 = 1 << 30;

/// Directories of this run, removed with all that is in them when dropped unless the caller has made them.
#[derive(Debug)]
pub(crate) struct Places {
    /// In memory: sockets, and the tmpfs image.
    shm: PathBuf,
    disk: PathBuf,
    /// Those that are ours to remove.
    _own: Vec<TempDir>,
    /// How the images were made, as a shell has it.
    pub(crate) preparation: Vec<String>,
}

impl Places {
    /// Makes the directories, and the images that `rows` need.
    pub(crate) fn new(arguments: &Arguments, rows: &[Row]) -> Result<Self, Error> {
        let mut own = Vec::new();
        let mut directory = |given: &Option<PathBuf>, default: &str, option: &str| {
            if let Some(given) = given {
                return std::path::absolute(given);
            }
            let made = tempfile::Builder::new()
                .prefix("versus-")
                .tempdir_in(default)
                .map_err(|error| {
                    let message = format!("{default}: {error}; name another with {option}");
                    std::io::Error::new(error.kind(), message)
                })?;
            let path = made.path().to_owned();
            own.push(made);
            Ok(path)
        };
        let mut places = Self {
            shm: directory(&arguments.shm, "/dev/shm", "--shm")?,
            disk: directory(&arguments.disk, "/var/tmp", "--disk")?,
            _own: own,
            preparation: Vec::new(),
        };
        let parent = |path: &Path| path.parent().unwrap_or(path).display().to_string();
        places.preparation.push(format!(
            "export SHM=$(mktemp -d {}/versus-XXXXXX) DISK=$(mktemp -d {}/versus-XXXXXX)",
            parent(&places.shm),
            parent(&places.disk)
        ));
        let needed = |image| rows.iter().any(|row| row.image == image);
        if needed(Image::Tmpfs) {
            places.make(Image::Tmpfs, arguments.shm_mib())?;
        }
        if needed(Image::Disk) {
            places.make(Image::Disk, arguments.disk_mib())?;
        }
        Ok(places)
    }

    /// Written all over with what no file system or disk can make less of.
    fn make(&mut self, image: Image, mib: u64) -> Result<(), Error> {
        let path = self.image(image);
        eprintln!("writing {mib} MiB to {}", path.display());
        let words = [
            "dd".to_owned(),
            "if=/dev/urandom".to_owned(),
            format!("of={}", path.display()),
            "bs=1M".to_owned(),
            format!("count={mib}"),
            "conv=fsync".to_owned(),
            "status=none".to_owned(),
        ];
        let status = Command::new(&words[0]).args(&words[1..]).status()?;
        if !status.success() {
            return Err(format!("{}: dd failed: {status}", path.display()).into());
        }
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .map_err(|error| {
                format!(
                    "{}: {error}: no direct I/O there (tmpfs has it from Linux 6.6 on); choose another directory with \
                     --shm or --disk",
                    path.display()
                )
            })?;
        let words = self.show(&words);
        self.preparation.push(words);
        Ok(())
    }

    /// The file of this image; that of null is none that there is.
    pub(crate) fn image(&self, image: Image) -> PathBuf {
        match image {
            Image::Null | Image::Tmpfs => self.shm.join("tmpfs.img"),
            Image::Disk => self.disk.join("disk.img"),
        }
    }

    /// Where SPDK and others put what they need besides.
    pub(crate) fn scratch(&self) -> &Path {
        &self.shm
    }

    /// The socket of each device, none of which is there.
    pub(crate) fn sockets(&self, count: u16) -> Vec<PathBuf> {
        let sockets = (0..count).map(|number| self.shm.join(format!("vhost.{number}")));
        sockets.collect()
    }

    /// Removes what a back-end has left.
    pub(crate) fn clear_sockets(&self, count: u16) {
        for socket in self.sockets(count) {
            // Most remove their own.
            let _ = fs::remove_file(socket);
        }
    }

    /// A command as one would write it in a shell, after [`preparation`](Self::preparation).
    pub(crate) fn show(&self, words: &[String]) -> String {
        let words: Vec<String> = words.iter().map(|word| self.show_word(word)).collect();
        words.join(" ")
    }

    fn show_word(&self, word: &str) -> String {
        let here = std::env::current_dir().unwrap_or_default();
        let here = format!("{}/", here.display());
        let plain = word
            .replace(&self.shm.display().to_string(), "$SHM")
            .replace(&self.disk.display().to_string(), "$DISK")
            .replace(&here, "");
        let needs_quotes = |c: char| !c.is_ascii_alphanumeric() && !"-_=+,./:$%!@".contains(c);
        if plain.contains(needs_quotes) {
            format!("\"{}\"", plain.replace('"', "\\\""))
        } else {
            plain
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn commands_are_shown_as_a_shell_takes_them() {
        let arguments = Arguments::parse_from(["versus"]);
        let places = Places::new(&arguments, &[]).unwrap();
        let image = places.image(Image::Tmpfs).display().to_string();
        let here = std::env::current_dir().unwrap().join("target/x");
        let words = [
            here.display().to_string(),
            format!("--blk-file={image}"),
            "a b".to_owned(),
        ];
        assert_eq!(
            places.show(&words),
            "target/x --blk-file=$SHM/tmpfs.img \"a b\""
        );
    }

    #[test]
    fn everything_is_removed_at_the_end() {
        let arguments = Arguments::parse_from(["versus", "--quick"]);
        let rows = super::super::rows::all(true);
        let places = Places::new(&arguments, &rows).unwrap();
        let images = [Image::Tmpfs, Image::Disk].map(|image| places.image(image));
        for image in &images {
            assert_eq!(fs::metadata(image).unwrap().len(), 64 << 20);
        }
        drop(places);
        for image in &images {
            assert!(!image.exists() && !image.parent().unwrap().exists());
        }
    }
}
