//! What sysfs tells about a block device: the limits of its queue, and how worn it is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lifetime::Wear;

/// Where it is mounted.
pub(super) const ROOT: &str = "/sys";

/// A disk's directory in sysfs. That of a partition's disk, since a partition has no queue of its own.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    directory: PathBuf,
}

impl Disk {
    /// The disk of device number `device`, if there is one below `root` (sysfs is not always mounted).
    pub(super) fn of(root: &Path, device: libc::dev_t) -> Option<Self> {
        let (major, minor) = (libc::major(device), libc::minor(device));
        let link = root.join(format!("dev/block/{major}:{minor}"));
        let mut directory = fs::canonicalize(link).ok()?;
        if directory.join("partition").exists() {
            directory.pop();
        }
        Some(Self { directory })
    }

    /// A number about its queue.
    pub(super) fn queue_attribute(&self, name: &str) -> Option<u64> {
        let path = self.directory.join("queue").join(name);
        fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Where it says how worn it is, if it does.
    pub(super) fn wear(&self) -> Option<WearFiles> {
        let device = fs::canonicalize(self.directory.join("device")).ok()?;
        let mmc = WearFiles::of_mmc(&device);
        // UFS has it at the controller, some levels above each of its disks.
        let ufs = device.ancestors().map(|device| {
            let health = device.join("health_descriptor");
            WearFiles {
                pre_eol: health.join("eol_info"),
                life_times: ["life_time_estimation_a", "life_time_estimation_b"]
                    .map(|name| health.join(name))
                    .into(),
            }
        });
        std::iter::once(mmc)
            .chain(ufs)
            .find(|files| files.read().is_some_and(|wear| wear != Wear::default()))
    }
}

/// The files that say how worn a disk is.
#[derive(Clone, Debug)]
pub(crate) struct WearFiles {
    pre_eol: PathBuf,
    /// Of type A and type B: in one file, or in one each.
    life_times: Vec<PathBuf>,
}

impl WearFiles {
    /// Of an MMC card's directory.
    pub(crate) fn of_mmc(card: &Path) -> Self {
        Self {
            pre_eol: card.join("pre_eol_info"),
            life_times: vec![card.join("life_time")],
        }
    }

    /// Reads them. May take as long as the device does to answer: UFS is asked each time.
    pub(crate) fn read(&self) -> Option<Wear> {
        let pre_eol = fs::read_to_string(&self.pre_eol).ok()?;
        let mut life_times = String::new();
        for path in &self.life_times {
            life_times += &fs::read_to_string(path).ok()?;
            life_times.push(' ');
        }
        parse(&pre_eol, &life_times)
    }
}

/// `0x01` and `0x01 0x02`, as the kernel's mmc and UFS drivers write them.
fn parse(pre_eol: &str, life_times: &str) -> Option<Wear> {
    let number = |text: &str| u8::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let mut types = life_times.split_whitespace();
    let (type_a, type_b) = (number(types.next()?)?, number(types.next()?)?);
    if types.next().is_some() {
        return None;
    }
    Some(Wear::new(number(pre_eol.trim())?, type_a, type_b))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A tree like sysfs, with one disk of number 179:0 in `directory`.
    struct Tree(TempDir);

    impl Tree {
        fn with_disk(directory: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.file(&format!("{directory}/queue/discard_granularity"), "4096\n");
            fs::create_dir_all(tree.0.path().join("dev/block")).unwrap();
            tree.link("dev/block/179:0", directory);
            tree
        }

        fn link(&self, link: &str, to: &str) {
            symlink(self.0.path().join(to), self.0.path().join(link)).unwrap();
        }

        fn file(&self, name: &str, content: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn disk(&self, minor: u32) -> Option<Disk> {
            Disk::of(self.0.path(), libc::makedev(179, minor))
        }

        fn wear(&self) -> Option<Wear> {
            self.disk(0).unwrap().wear()?.read()
        }
    }

    const MMC: &str = "devices/platform/soc/mmc_host/mmc0/mmc0:0001";

    fn emmc(pre_eol: &str, life_time: &str) -> Tree {
        let disk = format!("{MMC}/block/mmcblk0");
        let tree = Tree::with_disk(&disk);
        tree.link(&format!("{disk}/device"), MMC);
        tree.file(&format!("{MMC}/pre_eol_info"), pre_eol);
        tree.file(&format!("{MMC}/life_time"), life_time);
        tree
    }

    #[test]
    fn partition_has_the_queue_of_its_disk() {
        let tree = emmc("0x01\n", "0x01 0x02\n");
        tree.file(&format!("{MMC}/block/mmcblk0/mmcblk0p1/partition"), "1\n");
        tree.link("dev/block/179:1", &format!("{MMC}/block/mmcblk0/mmcblk0p1"));
        for minor in [0, 1] {
            let disk = tree.disk(minor).unwrap();
            assert_eq!(disk.queue_attribute("discard_granularity"), Some(4096));
            assert_eq!(disk.queue_attribute("discard_max_bytes"), None);
            assert!(disk.wear().is_some());
        }
        assert!(tree.disk(2).is_none());
    }

    #[test]
    fn emmc_says_how_worn_it_is() {
        let tree = emmc("0x02\n", "0x0b 0x03\n");
        assert_eq!(tree.wear(), Some(Wear::new(2, 11, 3)));
        // And later on something else.
        let files = tree.disk(0).unwrap().wear().unwrap();
        tree.file(&format!("{MMC}/life_time"), "0x0b 0x04\n");
        assert_eq!(files.read(), Some(Wear::new(2, 11, 4)));
        // A card that was taken out.
        fs::remove_file(tree.0.path().join(MMC).join("life_time")).unwrap();
        assert_eq!(files.read(), None);
    }

    #[test]
    fn ufs_says_it_at_the_controller() {
        const CONTROLLER: &str = "devices/platform/soc/1d84000.ufshc";
        let unit = format!("{CONTROLLER}/host0/target0:0:0/0:0:0:3");
        let disk = format!("{unit}/block/sdd");
        let tree = Tree::with_disk(&disk);
        tree.link(&format!("{disk}/device"), &unit);
        assert_eq!(tree.wear(), None);
        let health = format!("{CONTROLLER}/health_descriptor");
        tree.file(&format!("{health}/eol_info"), "0x01\n");
        tree.file(&format!("{health}/life_time_estimation_a"), "0x02\n");
        tree.file(&format!("{health}/life_time_estimation_b"), "0x01\n");
        assert_eq!(tree.wear(), Some(Wear::new(1, 2, 1)));
    }

    #[test]
    fn what_does_not_say_is_not_asked() {
        // Before version 5.0 of the standard; and what no kernel writes.
        for (pre_eol, life_time) in [
            ("0x00\n", "0x00 0x00\n"),
            ("", "0x01 0x01\n"),
            ("0x01\n", "0x01\n"),
            ("0x01\n", "0x01 0x01 0x01\n"),
            ("1\n", "1 1\n"),
            ("0x100\n", "0x01 0x01\n"),
            ("0x01\n", "0x-1 0x01\n"),
        ] {
            let tree = emmc(pre_eol, life_time);
            assert!(
                tree.disk(0).unwrap().wear().is_none(),
                "{pre_eol:?} {life_time:?}"
            );
        }
        // A disk of another kind, and one without a device behind it (device mapper).
        let disk = Tree::with_disk("devices/pci/ata1/block/sda");
        assert!(disk.disk(0).unwrap().wear().is_none());
    }
}
