//! A Linux guest in QEMU that runs one script and reports over a serial port.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::cpio;
use crate::deadline::{Deadline, Lines, Next};
use crate::lab::Lab;

/// A guest under TCG needs 3 s to boot and no script more than 20 s: beyond this it hangs, on however
/// loaded a machine.
pub(crate) const GUEST_DEADLINE: Duration = Duration::from_secs(240);

/// Bytes of a guest's console that are printed when its test fails.
const TAIL: usize = 16 << 10;

/// A guest to be.
#[derive(Debug)]
pub(crate) struct Guest<'lab> {
    lab: &'lab Lab,
    name: String,
    qemu: Vec<String>,
    memory: &'static str,
    cpus: u16,
    disks: usize,
    packed: bool,
    reconnect: &'static str,
    fio: bool,
    reboots: bool,
}

impl<'lab> Guest<'lab> {
    /// `name` tells the guests of one test apart.
    pub(crate) fn new(lab: &'lab Lab, name: &str) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            qemu: Vec::new(),
            memory: "512M",
            cpus: 2,
            disks: 0,
            packed: false,
            reconnect: "",
            fio: false,
            reboots: false,
        }
    }

    /// Gives it so many CPUs, and the disks added from now on as many request queues. Two unless said otherwise.
    pub(crate) fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// Gives the disks added from now on packed rings, which QEMU does not do unless told to.
    pub(crate) fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    /// Has QEMU connect anew, every second, to the backends of disks added from now on, when they have gone.
    pub(crate) fn reconnecting(mut self) -> Self {
        self.reconnect = ",reconnect=1";
        self
    }

    /// Adds a disk served on `socket`, with a request queue per CPU: /dev/vda, then /dev/vdb.
    pub(crate) fn disk(mut self, socket: &Path) -> Self {
        let id = format!("disk{}", self.disks);
        self.disks += 1;
        self.qemu.extend([
            "-chardev".to_owned(),
            format!("socket,id={id},path={}{}", socket.display(), self.reconnect),
            "-device".to_owned(),
            format!(
                "vhost-user-blk-pci,chardev={id},num-queues={},packed={}",
                self.cpus,
                if self.packed { "on" } else { "off" }
            ),
        ]);
        self
    }

    /// Gives QEMU a monitor, at NAME.monitor.
    pub(crate) fn monitored(mut self) -> Self {
        let path = self.lab.path(&format!("{}.monitor", self.name));
        self.qemu.extend([
            "-monitor".to_owned(),
            format!("unix:{},server=on,wait=off", path.display()),
        ]);
        self
    }

    /// Boots nothing: waits for a guest to migrate here, through a socket at `path`.
    pub(crate) fn incoming(mut self, path: &Path) -> Self {
        self.qemu
            .extend(["-incoming".to_owned(), format!("unix:{}", path.display())]);
        self
    }

    /// Size of the guest's memory, as QEMU spells it.
    pub(crate) fn memory(mut self, size: &'static str) -> Self {
        self.memory = size;
        self
    }

    /// Puts fio into the guest.
    pub(crate) fn with_fio(mut self) -> Self {
        self.fio = true;
        self
    }

    /// Lets the guest reboot; without this a reboot ends it.
    pub(crate) fn may_reboot(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Boots with the memory and the disks added here, and runs `script` after prelude.sh.
    pub(crate) fn start(self, script: &str) -> Running {
        let memory = self.memory;
        let mut command = self.emulator();
        command
            .args(["-machine", "q35,memory-backend=mem", "-m", memory])
            .arg("-object")
            // The backend maps the guest's memory, which only a shared one allows.
            .arg(format!(
                "memory-backend-memfd,id=mem,size={memory},share=on"
            ))
            .args(&self.qemu);
        self.boot(command, script)
    }

    /// Boots with nothing but `arguments`, which are in a shell's syntax, for memory and disks.
    pub(crate) fn start_with_arguments(self, arguments: &str, script: &str) -> Running {
        let plain = self.emulator();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("exec \"$0\" \"$@\" {arguments}"))
            .arg(plain.get_program())
            .args(plain.get_args());
        self.boot(command, script)
    }

    /// QEMU with everything but memory, disks and what is booted.
    fn emulator(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-smp", &self.cpus.to_string()]);
        match std::env::var("GUEST_ACCEL").as_deref() {
            Err(_) | Ok("tcg") => command.args(["-accel", "tcg,thread=multi"]),
            Ok("kvm") => command.args(["-accel", "kvm", "-cpu", "host"]),
            Ok(other) => panic!("GUEST_ACCEL={other}: give tcg or kvm"),
        };
        command
    }

    fn boot(self, mut command: Command, script: &str) -> Running {
        let initrd = self.lab.path(&format!("{}.initrd", self.name));
        self.write_initrd(&initrd, script).unwrap();
        let console = self.lab.path(&format!("{}.console", self.name));
        let errors = self.lab.path(&format!("{}.qemu", self.name));
        command
            .arg("-kernel")
            .arg(&self.lab.assets.kernel)
            .arg("-initrd")
            .arg(&initrd)
            // no_timer_check: on a loaded machine the emulated timer's interrupts come too late for the
            // kernel's check of them at boot, which then panics.
            .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).unwrap());
        if !self.reboots {
            command.arg("-no-reboot");
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Running {
            lines: Lines::of(child.stdout.take().unwrap()),
            child,
            name: self.name,
            console,
            errors,
            deadline: Deadline::after(GUEST_DEADLINE),
            results: BTreeMap::new(),
        }
    }

    fn write_initrd(&self, path: &Path, script: &str) -> io::Result<()> {
        let mut initrd = File::create(path)?;
        io::copy(&mut File::open(&self.lab.assets.base_archive)?, &mut initrd)?;
        if self.fio {
            io::copy(&mut File::open(&self.lab.assets.fio_archive)?, &mut initrd)?;
        }
        let script = format!("{}{script}", include_str!("prelude.sh"));
        initrd.write_all(&cpio::archive_of("test.sh", script.as_bytes()))
    }
}

/// A booted guest; killed if the test ends before it does.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    lines: Lines,
    name: String,
    console: PathBuf,
    errors: PathBuf,
    deadline: Deadline,
    results: BTreeMap<String, String>,
}

impl Running {
    /// Waits until the guest has reported `name`, and returns the value it gave.
    pub(crate) fn wait_for(&mut self, name: &str) -> &str {
        while !self.results.contains_key(name) {
            match self.lines.next(self.deadline) {
                Next::Line(line) => self.record(&line),
                Next::End => panic!("guest {}: ended without reporting {name}", self.name),
                Next::DeadlinePassed => panic!("guest {}: hangs before {name}", self.name),
            }
        }
        &self.results[name]
    }

    /// Pulls the plug.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the script's end and the guest's, and returns what was reported, by name. Whatever the
    /// guest reported as failed fails the test.
    pub(crate) fn finish(mut self) -> Results {
        self.wait_for("script");
        match self.deadline.wait(&mut self.child) {
            Some(status) => assert!(status.success(), "guest {}: QEMU: {status}", self.name),
            None => panic!("guest {}: does not power off", self.name),
        }
        while let Next::Line(line) = self.lines.next(self.deadline) {
            self.record(&line);
        }
        Results(std::mem::take(&mut self.results))
    }

    /// Takes a line `RESULT name ok|fail value`.
    fn record(&mut self, line: &str) {
        let mut words = line.splitn(4, ' ');
        let (Some("RESULT"), Some(name), Some(verdict)) =
            (words.next(), words.next(), words.next())
        else {
            panic!("guest {}: unexpected line {line:?}", self.name);
        };
        assert_eq!(verdict, "ok", "guest {}: {line}", self.name);
        let value = words.next().unwrap_or_default().trim().to_owned();
        // A script that starts over, after a reboot that nobody asked for, would hide what it found before.
        let before = self.results.insert(name.to_owned(), value);
        assert_eq!(before, None, "guest {}: {name} reported twice", self.name);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when QEMU has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            for (what, path) in [("console", &self.console), ("QEMU's stderr", &self.errors)] {
                let text = fs::read(path).unwrap_or_default();
                // The end tells what it came to; the whole of a guest that oopses in a loop would bury it.
                let text = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL)..]);
                eprintln!("--- guest {}: {what}\n{text}\n---", self.name);
            }
            eprintln!("--- guest {}: reported {:#?}", self.name, self.results);
        }
    }
}

/// What a guest reported.
#[derive(Debug)]
pub(crate) struct Results(BTreeMap<String, String>);

impl Results {
    #[track_caller]
    pub(crate) fn value(&self, name: &str) -> &str {
        match self.0.get(name) {
            Some(value) => value,
            None => panic!("the guest did not report {name}: {self:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn number(&self, name: &str) -> u64 {
        let value = self.value(name);
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}: {value:?} is no number"))
    }

    /// Asserts that the guest reported each name, as passed: what is not reported has not been checked.
    #[track_caller]
    pub(crate) fn assert_checked(&self, names: &[&str]) {
        for name in names {
            self.value(name);
        }
    }
}
