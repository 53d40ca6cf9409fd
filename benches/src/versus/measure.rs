//! One measurement: the back-end is started, loaded and ended, and the next one finds nothing of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::backend::{self, Backend};
use super::contenders::{Contender, Kind};
use super::places::Places;
use super::rows::{Job, Load, Row};
use super::{Arguments, client, idle};

/// What a guest that is going to be stopped is told to do meanwhile.
const IDLE_LOAD: Load = Load {
    rw: "randread",
    bs: "4k",
    depth: 32,
    polls: false,
    thinktime: None,
    rate: None,
    devices: 1,
    memory_regions: 1,
};

/// Longer than it is let live.
const IDLE_RUNTIME: f64 = 3600.0;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Measurement<'a> {
    pub(crate) arguments: &'a Arguments,
    pub(crate) places: &'a Places,
    pub(crate) row: &'a Row,
    pub(crate) contender: &'a Contender,
    /// What makes the load: this project's program, whoever is measured.
    pub(crate) load_generator: &'a Path,
}

impl Measurement<'_> {
    pub(crate) fn run(&self) -> Result<Value, String> {
        let result = self.try_run();
        self.places.clear_sockets(self.devices());
        result
    }

    fn try_run(&self) -> Result<Value, String> {
        let scratch = &self.arguments.results;
        if let Some(words) = self.standalone() {
            return client::run(&words, self.takes(), scratch);
        }
        let commands = self
            .contender
            .commands(self.places, self.row.image, self.devices())
            .ok_or("it is no back-end")?;
        let sockets = self.sockets();
        let log = scratch.join("backend.log");
        if self.row.job == Job::Start {
            let socket = sockets.first().ok_or("no socket")?;
            return idle::start(&commands, socket, &log);
        }
        let mut backend = Backend::start(&commands, self.arguments.backend_cpu, &sockets, &log)?;
        let words = self.client_of(&backend.pid().to_string());
        let result = if self.row.job == Job::Idle {
            let time = Duration::from_secs_f64(self.arguments.runtime() * 2.0);
            idle::idle(&backend, &words, time, scratch)
        } else {
            client::run(&words, self.takes(), scratch)
        };
        // A back-end that has died is the better explanation of a client's failure.
        backend.still_runs()?;
        result.map_err(|error| match backend.complaint() {
            said if said.is_empty() => error,
            said => format!("{error}; the back-end: {said}"),
        })
    }

    /// The commands as a shell has them, the back-end's first.
    pub(crate) fn shown(&self) -> Vec<String> {
        if let Some(words) = self.standalone() {
            return vec![self.places.show(&words)];
        }
        let devices = self.devices();
        let Some(commands) = self
            .contender
            .commands(self.places, self.row.image, devices)
        else {
            return Vec::new();
        };
        if self.row.job == Job::Start {
            return vec![self.places.show(&commands.serve)];
        }
        let serve = backend::pinned(self.arguments.backend_cpu, &commands.serve);
        let mut shown = vec![format!("{} &", self.places.show(&serve))];
        shown.extend(commands.set_up.iter().map(|words| self.places.show(words)));
        shown.push(self.places.show(&self.client_of("$!")));
        if self.row.job == Job::Idle {
            shown.push(
                "kill -STOP of that, and processor time and memory of the back-end before and then"
                    .into(),
            );
        }
        shown
    }

    fn standalone(&self) -> Option<Vec<String>> {
        let (runtime, ramp) = (self.arguments.runtime(), self.arguments.ramp_time());
        let words = self
            .contender
            .standalone(self.places, self.row, runtime, ramp)?;
        Some(backend::pinned(self.arguments.backend_cpu, &words))
    }

    fn client_of(&self, pid: &str) -> Vec<String> {
        let cpu = self.arguments.client_cpu;
        let (load, runtime, ramp_time) = match self.row.job {
            Job::Load(load) => (load, self.arguments.runtime(), self.arguments.ramp_time()),
            Job::Start | Job::Idle => (IDLE_LOAD, IDLE_RUNTIME, 0.0),
        };
        let sockets = self.sockets();
        let words = client::load_generator(
            self.load_generator,
            &load,
            &sockets,
            pid,
            cpu,
            runtime,
            ramp_time,
        );
        backend::pinned(cpu, &words)
    }

    fn sockets(&self) -> Vec<PathBuf> {
        self.places.sockets(self.devices())
    }

    fn devices(&self) -> u16 {
        match self.row.job {
            Job::Load(load) => load.devices,
            Job::Start | Job::Idle => 1,
        }
    }

    fn takes(&self) -> Duration {
        Duration::from_secs_f64(self.arguments.runtime() + self.arguments.ramp_time())
    }
}

/// The program of this project among who is measured: it makes the load for all.
pub(crate) fn load_generator(contenders: &[Contender]) -> Option<PathBuf> {
    contenders
        .iter()
        .find_map(|contender| match &contender.kind {
            Kind::Ours { program, .. } => Some(program.clone()),
            _ => None,
        })
}
