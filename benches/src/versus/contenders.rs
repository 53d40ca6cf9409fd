//! Who is measured, and how each is started.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Arguments;
use super::places::{NULL_SIZE, Places};
use super::rows::{Floor, Image, Job, Load, Ours, Peers, Row};
use crate::Error;

/// Somebody to measure.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    /// As the report has it.
    pub(crate) name: String,
    /// Variants of one program, of which the best counts, have this in common.
    pub(crate) family: String,
    pub(crate) kind: Kind,
    images: &'static [Image],
}

/// How somebody is started.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Ours {
        program: PathBuf,
        variant: Ours,
    },
    Qemu {
        program: PathBuf,
        /// `aio=`; of a device that stores nothing, nothing.
        aio: &'static str,
    },
    Spdk {
        vhost: PathBuf,
        rpc: PathBuf,
        /// `null`, `aio` or `uring`: the block device module.
        module: &'static str,
    },
    CloudHypervisor(PathBuf),
    Crosvm(PathBuf),
    /// A command of the user's, see `--peer`.
    Told(String),
    Floor {
        program: PathBuf,
        engine: Floor,
    },
    Fio {
        engine: Floor,
    },
}

impl Kind {
    pub(crate) fn is_qemu(&self) -> bool {
        matches!(self, Self::Qemu { .. })
    }

    /// Somebody else's back-end.
    pub(crate) fn is_peer(&self) -> bool {
        !matches!(
            self,
            Self::Ours { .. } | Self::Floor { .. } | Self::Fio { .. }
        )
    }
}

/// Somebody who could be measured, and is not here.
#[derive(Clone, Debug)]
pub(crate) struct Missing {
    pub(crate) name: String,
    pub(crate) remedy: String,
}

/// Everybody.
#[derive(Clone, Debug)]
pub(crate) struct Contenders {
    all: Vec<Contender>,
    pub(crate) missing: Vec<Missing>,
    /// A line each: program and version.
    pub(crate) versions: Vec<(String, String)>,
}

const NULL: &[Image] = &[Image::Null];
const FILES: &[Image] = &[Image::Tmpfs, Image::Disk];
const EVERYTHING: &[Image] = &[Image::Null, Image::Tmpfs, Image::Disk];

impl Contenders {
    /// Looks for the programs.
    pub(crate) fn find(arguments: &Arguments) -> Result<Self, Error> {
        let mut found = Self {
            all: Vec::new(),
            missing: Vec::new(),
            versions: Vec::new(),
        };
        found.add_ours(arguments)?;
        found.add_qemu();
        found.add_spdk();
        found.add_others();
        for peer in &arguments.peer {
            found.add_told(peer)?;
        }
        found.add_floors()?;
        found
            .all
            .retain(|contender| arguments.wants_contender(&contender.name));
        Ok(found)
    }

    /// Who takes part in this row, in a fixed order.
    pub(crate) fn of(&self, row: &Row) -> impl Iterator<Item = &Contender> {
        let takes_part = |contender: &&Contender| {
            // Bare loops and fio are no back-ends that could be left alone.
            if !contender.images.contains(&row.image) {
                return false;
            }
            match &contender.kind {
                Kind::Ours { variant, .. } => row.ours.contains(variant),
                Kind::Floor { engine, .. } => row.floors.contains(engine),
                Kind::Fio { engine } => row.fio.contains(engine),
                Kind::Qemu { aio, .. } => {
                    row.peers == Peers::All || row.peers == Peers::QemuNative && *aio == "native"
                }
                _ => row.peers == Peers::All,
            }
        };
        self.all.iter().filter(takes_part)
    }

    pub(crate) fn all(&self) -> &[Contender] {
        &self.all
    }

    fn add(&mut self, family: &str, variant: &str, kind: Kind, images: &'static [Image]) {
        let name = match variant {
            "" => family.to_owned(),
            _ => format!("{family}, {variant}"),
        };
        self.all.push(Contender {
            name,
            family: family.to_owned(),
            kind,
            images,
        });
    }

    fn miss(&mut self, name: &str, remedy: &str) {
        self.missing.push(Missing {
            name: name.to_owned(),
            remedy: remedy.to_owned(),
        });
    }

    fn add_ours(&mut self, arguments: &Arguments) -> Result<(), Error> {
        let program = match &arguments.program {
            Some(program) => std::path::absolute(program)?,
            None => beside_us("blk-dataplane")?,
        };
        let Some(version) = version_of(&program, "--version") else {
            return Err(format!(
                "{} does not run: cargo build --release -p blk-dataplane-cli, or name it with --program",
                program.display()
            )
            .into());
        };
        self.versions.push(("blk-dataplane".to_owned(), version));
        for (variant, images) in [
            (Ours::Default, EVERYTHING),
            (Ours::IoUring, FILES),
            (Ours::NoPolling, EVERYTHING),
            (Ours::NoMerging, FILES),
        ] {
            let kind = Kind::Ours {
                program: program.clone(),
                variant,
            };
            self.add("blk-dataplane", name_of_ours(variant), kind, images);
        }
        Ok(())
    }

    fn add_qemu(&mut self) {
        const NAME: &str = "qemu-storage-daemon";
        let mut programs: Vec<PathBuf> = Vec::new();
        programs.extend(on_path(NAME));
        if let Some(more) = std::env::var_os("QEMU_STORAGE_DAEMON") {
            programs.extend(std::env::split_paths(&more));
        }
        if programs.is_empty() {
            self.miss(
                NAME,
                "apt-get install qemu-system-common, or name one in QEMU_STORAGE_DAEMON",
            );
        }
        for program in programs {
            let Some(version) = version_of(&program, "--version") else {
                self.miss(&program.display().to_string(), "it does not run");
                continue;
            };
            // "qemu-storage-daemon version 7.2.22 (Debian ...)"
            let number = version.split_whitespace().nth(2).unwrap_or("?");
            let family = format!("{NAME} {number}");
            if self.all.iter().any(|known| known.family == family) {
                continue;
            }
            self.versions.push((family.clone(), version));
            let kind = |aio| Kind::Qemu {
                program: program.clone(),
                aio,
            };
            // What stores nothing has no engine.
            self.add(&family, "null-co", kind(""), NULL);
            self.add(&family, "aio=native", kind("native"), FILES);
            self.add(&family, "aio=io_uring", kind("io_uring"), FILES);
        }
    }

    fn add_spdk(&mut self) {
        const NAME: &str = "SPDK vhost";
        let built = std::env::var_os("SPDK_DIR")
            .map(PathBuf::from)
            .map(|dir| (dir.join("build/bin/vhost"), dir.join("scripts/rpc.py")));
        let installed = || Some((on_path("spdk_vhost")?, on_path("spdk_rpc.py")?));
        let Some((vhost, rpc)) = built.or_else(installed) else {
            self.miss(
                NAME,
                "build SPDK, set SPDK_DIR to its directory, and set huge pages up (scripts/setup.sh)",
            );
            return;
        };
        let Some(version) = version_of(&vhost, "--version") else {
            self.miss(NAME, &format!("{} does not run", vhost.display()));
            return;
        };
        self.versions.push((NAME.to_owned(), version));
        for (module, images) in [("null", NULL), ("aio", FILES), ("uring", FILES)] {
            let kind = Kind::Spdk {
                vhost: vhost.clone(),
                rpc: rpc.clone(),
                module,
            };
            self.add(NAME, &format!("bdev_{module}"), kind, images);
        }
    }

    fn add_others(&mut self) {
        match on_path("vhost_user_block") {
            Some(program) => {
                const NAME: &str = "Cloud Hypervisor vhost_user_block";
                let version = version_of(&program, "--version").unwrap_or_default();
                self.versions.push((NAME.to_owned(), version));
                self.add(NAME, "", Kind::CloudHypervisor(program), FILES);
            }
            None => self.miss(
                "Cloud Hypervisor vhost_user_block",
                "cargo build --release -p vhost_user_block in its repository, and put the program on PATH",
            ),
        }
        match on_path("crosvm") {
            Some(program) => {
                let version = version_of(&program, "version").unwrap_or_default();
                self.versions.push(("crosvm".to_owned(), version));
                self.add("crosvm", "", Kind::Crosvm(program), FILES);
            }
            None => self.miss("crosvm", "build it and put it on PATH"),
        }
    }

    fn add_told(&mut self, peer: &str) -> Result<(), Error> {
        let wrong =
            || format!("--peer {peer}: NAME=COMMAND with {{socket}}, and {{image}} or {{size}}");
        let (name, command) = peer.split_once('=').ok_or_else(wrong)?;
        let images = match (command.contains("{image}"), command.contains("{size}")) {
            _ if !command.contains("{socket}") => return Err(wrong().into()),
            (true, _) => FILES,
            (false, true) => NULL,
            (false, false) => return Err(wrong().into()),
        };
        self.versions.push((name.to_owned(), command.to_owned()));
        self.add(name, "", Kind::Told(command.to_owned()), images);
        Ok(())
    }

    fn add_floors(&mut self) -> Result<(), Error> {
        let program = beside_us("floor")?;
        for (engine, images) in [
            (Floor::Libaio, FILES),
            (Floor::IoUring, FILES),
            (Floor::Memcpy, &[Image::Tmpfs][..]),
        ] {
            let kind = Kind::Floor {
                program: program.clone(),
                engine,
            };
            self.add("bare loop", name_of_floor(engine), kind, images);
        }
        match on_path("fio").and_then(|fio| version_of(&fio, "--version")) {
            Some(version) => {
                self.versions.push(("fio".to_owned(), version));
                for engine in [Floor::Libaio, Floor::IoUring] {
                    self.add("fio", fio_engine(engine), Kind::Fio { engine }, FILES);
                }
            }
            None => self.miss("fio", "apt-get install fio"),
        }
        Ok(())
    }
}

/// The names that bars and plots know variants by.
pub(crate) fn name_of_ours(variant: Ours) -> &'static str {
    match variant {
        Ours::Default => "",
        Ours::IoUring => "io_uring",
        Ours::NoPolling => "polling off",
        Ours::NoMerging => "merging off",
    }
}

fn name_of_floor(engine: Floor) -> &'static str {
    match engine {
        Floor::Libaio => "io_submit",
        Floor::IoUring => "io_uring",
        Floor::Memcpy => "memcpy",
    }
}

fn fio_engine(engine: Floor) -> &'static str {
    match engine {
        Floor::Libaio => "libaio",
        Floor::IoUring => "io_uring",
        Floor::Memcpy => "mmap",
    }
}

/// A program that cargo has put where this one is.
fn beside_us(name: &str) -> Result<PathBuf, Error> {
    let path = std::env::current_exe()?.with_file_name(name);
    if path.exists() {
        return Ok(path);
    }
    // A test's own program is one directory further down.
    let above = path.parent().and_then(Path::parent);
    match above.map(|above| above.join(name)) {
        Some(above) if above.exists() => Ok(above),
        _ => Err(format!(
            "{} is missing: cargo build --release -p blk-dataplane-cli -p benches",
            path.display()
        )
        .into()),
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}

/// The first line that the program says about its version.
fn version_of(program: &Path, option: &str) -> Option<String> {
    let output = Command::new(program).arg(option).output().ok()?;
    if !output.status.success() {
        return None;
    }
    let said = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    let text = String::from_utf8_lossy(&said);
    text.lines().next().map(str::to_owned)
}

/// The commands that make a back-end: the one that stays, and those that set it up then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Commands {
    pub(crate) serve: Vec<String>,
    pub(crate) set_up: Vec<Vec<String>>,
    /// The socket that has to be there before the setting up.
    pub(crate) control: Option<PathBuf>,
}

impl Contender {
    /// How this back-end is started for `devices` devices over `image`. `None`: it is none.
    pub(crate) fn commands(&self, places: &Places, image: Image, devices: u16) -> Option<Commands> {
        let sockets = places.sockets(devices);
        let file = places.image(image).display().to_string();
        let is_null = image == Image::Null;
        let mut commands = Commands::default();
        let serve = &mut commands.serve;
        let mut add = |words: &[&str]| serve.extend(words.iter().map(|&word| word.to_owned()));
        match &self.kind {
            Kind::Ours { program, variant } => {
                add(&[&program.display().to_string()]);
                let disk = if is_null {
                    ("null", "1G".to_owned())
                } else {
                    ("blk-file", file)
                };
                let option = match variant {
                    Ours::Default => None,
                    Ours::IoUring => Some(("engine", "io_uring")),
                    Ours::NoPolling => Some(("poll-max-us", "0")),
                    Ours::NoMerging => Some(("no-merge", "on")),
                };
                if let [socket] = &sockets[..] {
                    add(&[&format!("--{}", disk.0), &disk.1]);
                    add(&["--socket-path", &socket.display().to_string()]);
                    match option {
                        Some((name, "on")) => add(&[&format!("--{name}")]),
                        Some((name, value)) => add(&[&format!("--{name}"), value]),
                        None => {}
                    }
                } else {
                    let option =
                        option.map_or_else(String::new, |(name, value)| format!(",{name}={value}"));
                    for socket in &sockets {
                        let (name, value) = &disk;
                        let socket = socket.display();
                        add(&[
                            "--device",
                            &format!("{name}={value},socket-path={socket}{option}"),
                        ]);
                    }
                }
            }
            Kind::Qemu { program, aio } => {
                add(&[&program.display().to_string()]);
                add(&["--object", "iothread,id=iothread0"]);
                let disk = if is_null {
                    // What is read is left as it was, as this back-end's null device does it.
                    format!("driver=null-co,node-name=disk,size={NULL_SIZE},read-zeroes=off")
                } else {
                    format!("driver=file,node-name=disk,filename={file},cache.direct=on,aio={aio}")
                };
                add(&["--blockdev", &disk]);
                for (number, socket) in sockets.iter().enumerate() {
                    let socket = socket.display();
                    add(&[
                        "--export",
                        &format!(
                            "type=vhost-user-blk,id=export{number},node-name=disk,addr.type=unix,addr.path={socket},\
                             iothread=iothread0,writable=on"
                        ),
                    ]);
                }
            }
            Kind::Spdk { vhost, rpc, module } => {
                let control = places.scratch().join("rpc.sock");
                let directory = places.scratch().display().to_string();
                add(&[&vhost.display().to_string(), "-m", "0x1", "-s", "1024"]);
                add(&["-S", &directory, "-r", &control.display().to_string()]);
                let rpc = |words: &[&str]| {
                    let mut all = vec![rpc.display().to_string()];
                    all.extend(["-s".to_owned(), control.display().to_string()]);
                    all.extend(words.iter().map(|&word| word.to_owned()));
                    all
                };
                let mib = (NULL_SIZE >> 20).to_string();
                let disk = match *module {
                    "null" => rpc(&["bdev_null_create", "disk", &mib, "512"]),
                    "uring" => rpc(&["bdev_uring_create", &file, "disk", "512"]),
                    _ => rpc(&["bdev_aio_create", &file, "disk", "512"]),
                };
                commands.set_up.push(disk);
                for socket in &sockets {
                    let name = socket.file_name().unwrap_or_default().to_string_lossy();
                    commands.set_up.push(rpc(&[
                        "vhost_create_blk_controller",
                        "--cpumask",
                        "0x1",
                        &name,
                        "disk",
                    ]));
                }
                commands.control = Some(control.clone());
            }
            Kind::CloudHypervisor(program) => {
                let socket = sockets.first()?.display();
                add(&[
                    &program.display().to_string(),
                    "--block-backend",
                    &format!(
                        "path={file},socket={socket},num_queues=1,queue_size=1024,direct=true,poll_queue=true"
                    ),
                ]);
            }
            Kind::Crosvm(program) => {
                let socket = sockets.first()?.display();
                add(&[
                    &program.display().to_string(),
                    "devices",
                    "--disable-sandbox",
                    "--block",
                    &format!("vhost={socket},path={file},direct=true"),
                ]);
            }
            Kind::Told(command) => {
                let socket = sockets.first()?.display().to_string();
                let command = command
                    .replace("{socket}", &socket)
                    .replace("{image}", &file)
                    .replace("{size}", &NULL_SIZE.to_string());
                add(&["sh", "-c", &format!("exec {command}")]);
            }
            Kind::Floor { .. } | Kind::Fio { .. } => return None,
        }
        Some(commands)
    }

    /// The command of who does the whole work by itself: a bare loop, or fio.
    pub(crate) fn standalone(
        &self,
        places: &Places,
        row: &Row,
        runtime: f64,
        ramp_time: f64,
    ) -> Option<Vec<String>> {
        let Job::Load(Load { rw, bs, depth, .. }) = row.job else {
            return None;
        };
        let file = places.image(row.image).display().to_string();
        match &self.kind {
            Kind::Floor { program, engine } => {
                let engine = match engine {
                    Floor::Memcpy => "memcpy",
                    other => fio_engine(*other),
                };
                Some(vec![
                    program.display().to_string(),
                    format!("--ioengine={engine}"),
                    format!("--filename={file}"),
                    format!("--rw={rw}"),
                    format!("--bs={bs}"),
                    format!("--iodepth={depth}"),
                    format!("--runtime={runtime}"),
                    format!("--ramp-time={ramp_time}"),
                ])
            }
            Kind::Fio { engine } => Some(vec![
                "fio".to_owned(),
                "--name=versus".to_owned(),
                format!("--ioengine={}", fio_engine(*engine)),
                format!("--filename={file}"),
                "--direct=1".to_owned(),
                format!("--rw={rw}"),
                format!("--bs={bs}"),
                format!("--iodepth={depth}"),
                // No map of blocks done, which nobody else keeps; latencies with submission, as everybody else has them.
                "--norandommap=1".to_owned(),
                "--lat_percentiles=1".to_owned(),
                "--time_based".to_owned(),
                format!("--runtime={:.0}ms", runtime * 1e3),
                format!("--ramp_time={:.0}ms", ramp_time * 1e3),
                "--output-format=json".to_owned(),
            ]),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn places() -> Places {
        Places::new(&Arguments::parse_from(["versus"]), &[]).unwrap()
    }

    fn shown(kind: Kind, image: Image, devices: u16) -> String {
        let places = places();
        let contender = Contender {
            name: String::new(),
            family: String::new(),
            kind,
            images: EVERYTHING,
        };
        let commands = contender.commands(&places, image, devices).unwrap();
        let all = [commands.serve].into_iter().chain(commands.set_up);
        let lines: Vec<_> = all.map(|words| places.show(&words)).collect();
        lines.join("\n")
    }

    #[test]
    fn this_back_end_is_started_with_the_options_of_its_variant() {
        let ours = |variant| Kind::Ours {
            program: "blk-dataplane".into(),
            variant,
        };
        assert_eq!(
            shown(ours(Ours::Default), Image::Null, 1),
            "blk-dataplane --null 1G --socket-path $SHM/vhost.0"
        );
        assert_eq!(
            shown(ours(Ours::NoMerging), Image::Disk, 1),
            "blk-dataplane --blk-file $DISK/disk.img --socket-path $SHM/vhost.0 --no-merge"
        );
        assert_eq!(
            shown(ours(Ours::NoPolling), Image::Null, 2),
            "blk-dataplane --device null=1G,socket-path=$SHM/vhost.0,poll-max-us=0 \
             --device null=1G,socket-path=$SHM/vhost.1,poll-max-us=0"
        );
    }

    #[test]
    fn qemu_gets_a_thread_of_its_own_and_direct_io() {
        let kind = Kind::Qemu {
            program: "qemu-storage-daemon".into(),
            aio: "io_uring",
        };
        assert_eq!(
            shown(kind, Image::Tmpfs, 1),
            "qemu-storage-daemon --object iothread,id=iothread0 --blockdev \
             driver=file,node-name=disk,filename=$SHM/tmpfs.img,cache.direct=on,aio=io_uring --export \
             type=vhost-user-blk,id=export0,node-name=disk,addr.type=unix,addr.path=$SHM/vhost.0,\
             iothread=iothread0,writable=on"
        );
    }

    #[test]
    fn spdk_is_set_up_over_its_control_socket() {
        let kind = Kind::Spdk {
            vhost: "vhost".into(),
            rpc: "rpc.py".into(),
            module: "null",
        };
        assert_eq!(
            shown(kind, Image::Null, 1),
            "vhost -m 0x1 -s 1024 -S $SHM -r $SHM/rpc.sock\n\
             rpc.py -s $SHM/rpc.sock bdev_null_create disk 1024 512\n\
             rpc.py -s $SHM/rpc.sock vhost_create_blk_controller --cpumask 0x1 vhost.0 disk"
        );
    }

    #[test]
    fn a_peer_that_was_told_is_started_as_told() {
        let kind = Kind::Told("serve {image} at {socket}".to_owned());
        assert_eq!(
            shown(kind, Image::Disk, 1),
            "sh -c \"exec serve $DISK/disk.img at $SHM/vhost.0\""
        );
        let told = |peer| {
            let mut contenders = Contenders {
                all: Vec::new(),
                missing: Vec::new(),
                versions: Vec::new(),
            };
            contenders.add_told(peer).map(|()| contenders.all)
        };
        assert_eq!(told("a=b {socket} {image}").unwrap()[0].images, FILES);
        assert_eq!(
            told("a=b {socket} {size}").unwrap()[0].images,
            &[Image::Null]
        );
        for wrong in ["a", "a=b", "a=b {socket}", "a=b {image}"] {
            assert!(told(wrong).is_err(), "{wrong}");
        }
    }
}
