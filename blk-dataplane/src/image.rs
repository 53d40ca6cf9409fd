//! The disk image: a regular file or a block device, opened, measured and locked down to what its
//! file system allows.

mod hold;
mod lock;
mod probe;
mod sysfs;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hold::Hold;
pub use lock::LockHolder;
use probe::{DioAlignment, DioAnswer};
pub(crate) use probe::{Discard, IoHints};
pub(crate) use sysfs::WearFiles;

use crate::SECTOR_SIZE;

/// Why direct I/O is not used on an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BufferedReason {
    /// The caller asked for buffered I/O.
    Requested,
    /// The file system says that this file takes no direct I/O (statx `STATX_DIOALIGN` of zero).
    Refused,
    /// `open` with `O_DIRECT` failed.
    OpenFailed(String),
    /// The alignment it demands is not one a guest can be told (a power of two from 512 to 4096).
    Alignment(u32),
}

impl fmt::Display for BufferedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => f.write_str("buffered I/O was asked for"),
            Self::Refused => f.write_str("the file system takes no direct I/O on this file"),
            Self::OpenFailed(error) => write!(f, "opening with O_DIRECT failed: {error}"),
            Self::Alignment(bytes) => {
                write!(
                    f,
                    "direct I/O here wants blocks of {bytes} bytes, which a guest cannot use"
                )
            }
        }
    }
}

/// How the image's data reaches the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caching {
    /// `O_DIRECT`: past the host's page cache.
    Direct,
    /// Through the host's page cache; a flush still writes it out.
    Buffered(BufferedReason),
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Open for reading only; the device then offers `VIRTIO_BLK_F_RO`.
    pub read_only: bool,
    /// Use the page cache even where direct I/O is possible.
    pub buffered: bool,
    /// Take no lock. Otherwise the image is locked for one writer or for any number of readers
    /// for as long as it is open, and opening fails where somebody's lock is in the way. A block device that is
    /// opened for writing is also claimed (`O_EXCL`), so that it is not mounted meanwhile and was not before.
    pub force_share: bool,
    /// Keep others off only when the first ring is started, which fails if somebody has it then: for a device whose
    /// guest is to come from another process that has the image until that guest stops there (a live migration).
    pub incoming: bool,
}

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The host refused to open it (missing, no permission, read-only file system). Host's fault.
    #[error("cannot open {path}: {source}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused to create it. Host's fault.
    #[error("cannot create {path}: {source}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Its size or kind could not be asked. Host's fault.
    #[error("cannot examine {path}: {source}", path = path.display())]
    Examine {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Another process serves or uses it. Caller's fault.
    #[error(
        "{path} is in use{by}",
        path = path.display(),
        by = holder.as_ref().map_or(String::new(), |holder| format!(" by {holder}"))
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who has it, where the host tells.
        holder: Option<LockHolder>,
    },
    /// A block device that the host itself uses, mounted or as part of a RAID or volume group, or that another
    /// program has opened for itself alone. Caller's fault.
    #[error("{path} is in use by the host itself: mounted, swapped to, or part of a RAID or volume group", path = path.display())]
    InUseByHost {
        /// The device.
        path: PathBuf,
    },
    /// It could not be locked: its file system takes no locks. Host's fault.
    #[error("cannot lock {path}: {source}", path = path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is a directory, a pipe, a socket or a character device. Caller's fault.
    #[error("{path} is neither a regular file nor a block device", path = path.display())]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// It is smaller than one block. Caller's fault.
    #[error("{path} holds {size} bytes, less than one block of {block_size}", path = path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The device's logical block size in bytes.
        block_size: u32,
    },
}

/// An opened disk image.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<File>,
    hold: Arc<Hold>,
    path: PathBuf,
    capacity: u64,
    block_size: u32,
    memory_alignment: u32,
    io_hints: IoHints,
    discard: Option<Discard>,
    secure_erase: bool,
    wear: Option<WearFiles>,
    read_only: bool,
    caching: Caching,
}

impl Image {
    /// Creates a sparse image of `size` bytes unless something exists at `path`, which is then left
    /// as it is. Returns whether it was created.
    ///
    /// # Errors
    /// [`ImageError::Create`]; a half-made file is removed.
    pub fn create_if_missing(path: &Path, size: u64) -> Result<bool, ImageError> {
        let failed = |source| ImageError::Create {
            path: path.to_owned(),
            source,
        };
        // create_new: the check and the creation are one step, so that two starts cannot both win.
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
        {
            Ok(file) => match file.set_len(size) {
                Ok(()) => Ok(true),
                Err(error) => {
                    // The file is ours and empty; what removing it says matters less than why.
                    let _ = std::fs::remove_file(path);
                    Err(failed(error))
                }
            },
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Opens the image at `path`, with `O_DIRECT` where its file system takes it, and locks it
    /// (an open file description lock) until the last clone has gone.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, options: &ImageOptions) -> Result<Self, ImageError> {
        let examine = |source| ImageError::Examine {
            path: path.to_owned(),
            source,
        };
        // O_NONBLOCK: opening a FIFO by mistake must fail below, not hang here. It has no effect
        // on files and block devices.
        let file = open_file(path, options.read_only, libc::O_NONBLOCK).map_err(|source| {
            ImageError::Open {
                path: path.to_owned(),
                source,
            }
        })?;
        let metadata = file.metadata().map_err(examine)?;
        let kind = metadata.file_type();
        let (size, device_block) = if kind.is_file() {
            (metadata.len(), SECTOR_SIZE_U32)
        } else if kind.is_block_device() {
            (
                probe::block_device_size(&file).map_err(examine)?,
                probe::logical_block_size(&file).map_err(examine)?,
            )
        } else {
            return Err(ImageError::NotAnImage {
                path: path.to_owned(),
            });
        };

        let (file, caching, alignment) = if options.buffered {
            (file, Caching::Buffered(BufferedReason::Requested), None)
        } else {
            match open_direct(path, options.read_only, &file) {
                Ok((direct, alignment)) => (direct, Caching::Direct, Some(alignment)),
                Err(reason) => (file, Caching::Buffered(reason), None),
            }
        };
        let claims = kind.is_block_device() && !options.read_only;
        let hold = Hold::new(options.force_share, !options.read_only, claims);
        if !options.incoming {
            hold.take(path, &file)?;
        }
        let block_size = alignment.map_or(device_block, |a| a.offset.max(device_block));
        let io_hints = if kind.is_block_device() {
            probe::block_device_hints(&file).map_err(examine)?
        } else {
            probe::file_hints(&file).map_err(examine)?
        };
        // Blocks are whole (hostile-inputs I8): an odd tail is not part of the disk.
        let capacity = size - size % u64::from(block_size);
        if capacity == 0 {
            return Err(ImageError::TooSmall {
                path: path.to_owned(),
                size,
                block_size,
            });
        }
        let disk = if kind.is_block_device() {
            probe::disk_of(&file).map_err(examine)?
        } else {
            None
        };
        let discard = if options.read_only {
            None
        } else if kind.is_block_device() {
            disk.as_ref().and_then(probe::disk_discard)
        } else {
            probe::file_discard(&file).map_err(examine)?
        };
        let secure_erase =
            kind.is_block_device() && !options.read_only && probe::can_erase_securely(&file);
        Ok(Self {
            file: Arc::new(file),
            hold: Arc::new(hold),
            path: path.to_owned(),
            capacity,
            block_size,
            memory_alignment: alignment.map_or(1, |a| a.memory),
            io_hints,
            discard,
            secure_erase,
            wear: disk.and_then(|disk| disk.wear()),
            read_only: options.read_only,
            caching,
        })
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The same file opened anew, for one data thread. The kernel tells each open file of a failure to write
    /// back, once: threads that shared one would hide it from each other (hostile-inputs I6). Where it cannot be
    /// had (no `/proc`, no right any more), the one that all share.
    pub(crate) fn file_of_thread(&self) -> Arc<File> {
        let flags = match self.caching {
            Caching::Direct => libc::O_DIRECT,
            Caching::Buffered(_) => 0,
        };
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match open_file(Path::new(&path), self.read_only, flags) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                tracing::debug!(%error, "the image cannot be opened anew");
                Arc::clone(&self.file)
            }
        }
    }

    /// Keeps others off it, if it is not so already: see [`ImageOptions::incoming`] and [`release`](Self::release).
    ///
    /// # Errors
    /// [`ImageError::InUse`], [`ImageError::InUseByHost`], [`ImageError::Lock`].
    pub fn acquire(&self) -> Result<(), ImageError> {
        self.hold.take(&self.path, &self.file)
    }

    /// Lets others have it, before it is dropped: for a device whose guest goes on elsewhere. Whoever calls this has
    /// written out what was written, and serves no request until [`acquire`](Self::acquire) has succeeded.
    pub fn release(&self) {
        self.hold.release(&self.file);
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was opened, a multiple of [`block_size`](Self::block_size).
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Size in bytes at this moment, as the host says: it grows and shrinks under whoever has it open.
    ///
    /// # Errors
    /// [`ImageError::Examine`]. Host's fault.
    pub fn current_size(&self) -> Result<u64, ImageError> {
        let examine = |source| ImageError::Examine {
            path: self.path.clone(),
            source,
        };
        let metadata = self.file.metadata().map_err(examine)?;
        if metadata.file_type().is_block_device() {
            probe::block_device_size(&self.file).map_err(examine)
        } else {
            Ok(metadata.len())
        }
    }

    /// Storage can be given back to the host in units of so many bytes; `None` where it cannot.
    #[must_use]
    pub fn discard_granularity(&self) -> Option<u32> {
        self.discard.map(|discard| discard.granularity)
    }

    /// What can be given back, and how.
    pub(crate) fn discard(&self) -> Option<Discard> {
        self.discard
    }

    /// Whether the storage can be erased so that no copy is left: some block devices can, if this is one and
    /// is open for writing.
    #[must_use]
    pub fn can_erase_securely(&self) -> bool {
        self.secure_erase
    }

    /// Where the storage says how worn it is: eMMC and UFS do, if this is such a block device.
    pub(crate) fn wear(&self) -> Option<&WearFiles> {
        self.wear.as_ref()
    }

    /// What sizes of request the host's disk or file system likes.
    pub(crate) fn io_hints(&self) -> IoHints {
        self.io_hints
    }

    /// Smallest unit a request may address, in bytes: a power of two from 512.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What addresses and lengths of buffers must be multiples of, in bytes; 1 for buffered I/O.
    #[must_use]
    pub fn memory_alignment(&self) -> u32 {
        self.memory_alignment
    }

    /// Whether it was opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the host's page cache is used, and why.
    #[must_use]
    pub fn caching(&self) -> &Caching {
        &self.caching
    }
}

const SECTOR_SIZE_U32: u32 = 512;
const _: () = assert!(SECTOR_SIZE_U32 as u64 == SECTOR_SIZE);

/// Largest block size a guest is told. Linux drivers refuse a `blk_size` above the page size.
const BLOCK_SIZE_MAX: u32 = 4096;

fn open_file(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(path)
}

/// Claims the block device `device`, which was opened at `path`, for this program.
///
/// A lock is the path's: another node of the same device has locks of its own, and mount(8) asks for none. The
/// kernel's claim is the device's, and file systems, RAID, device mapper and other programs that open it so
/// take it too. With its partitions: those of a claimed disk cannot be mounted.
fn claim(path: &Path, device: &File) -> Result<File, ImageError> {
    let examine = |source| ImageError::Examine {
        path: path.to_owned(),
        source,
    };
    let claimed = open_file(path, true, libc::O_EXCL | libc::O_NONBLOCK).map_err(|source| {
        let path = path.to_owned();
        if source.raw_os_error() == Some(libc::EBUSY) {
            ImageError::InUseByHost { path }
        } else {
            ImageError::Open { path, source }
        }
    })?;
    let number = |file: &File| file.metadata().map(|metadata| metadata.rdev());
    if number(&claimed).map_err(examine)? != number(device).map_err(examine)? {
        return Err(examine(io::Error::other("it was replaced meanwhile")));
    }
    Ok(claimed)
}

fn open_direct(
    path: &Path,
    read_only: bool,
    buffered: &File,
) -> Result<(File, DioAlignment), BufferedReason> {
    let known = match probe::dio_alignment(buffered) {
        DioAnswer::Aligned(alignment) => Some(alignment),
        DioAnswer::Unknown => None,
        DioAnswer::Refused => return Err(BufferedReason::Refused),
    };
    let file = open_file(path, read_only, libc::O_DIRECT)
        .map_err(|error| BufferedReason::OpenFailed(error.to_string()))?;
    // The path was opened twice: size and kind were taken from the first.
    let identity = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
    match (identity(&file), identity(buffered)) {
        (Ok(direct), Ok(buffered)) if direct == buffered => {}
        _ => {
            let error = "the file was replaced meanwhile".to_owned();
            return Err(BufferedReason::OpenFailed(error));
        }
    }
    let alignment = match known {
        Some(alignment) => alignment,
        None => probe::disk_alignment(&file)
            .map_err(|error| BufferedReason::OpenFailed(error.to_string()))?,
    };
    let offset = alignment.offset;
    let usable = |bytes: u32| bytes.is_power_of_two() && bytes <= BLOCK_SIZE_MAX;
    if !usable(offset) || !usable(alignment.memory) {
        return Err(BufferedReason::Alignment(offset.max(alignment.memory)));
    }
    Ok((file, alignment))
}
