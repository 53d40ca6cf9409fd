//! Everything that was measured, as it is kept.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::contenders::Contenders;
use super::places::Places;
use super::{Arguments, machine};
use crate::Error;

/// A run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Results {
    pub(crate) date: String,
    /// The command line.
    pub(crate) command: String,
    pub(crate) rounds: usize,
    /// Seconds of each measurement, and of all of it.
    pub(crate) runtime: f64,
    pub(crate) took: f64,
    /// Name and value.
    pub(crate) machine: Vec<(String, String)>,
    /// Program and version.
    pub(crate) versions: Vec<(String, String)>,
    /// Who is not here, and how to have them.
    pub(crate) missing: Vec<(String, String)>,
    /// Commands that make the images.
    pub(crate) preparation: Vec<String>,
    pub(crate) contenders: Vec<Known>,
    pub(crate) records: Vec<Record>,
}

/// A contender, as the figures need to know it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) family: String,
    pub(crate) is_qemu: bool,
    pub(crate) is_peer: bool,
}

/// A measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Record {
    pub(crate) round: usize,
    pub(crate) row: String,
    pub(crate) contender: String,
    pub(crate) commands: Vec<String>,
    /// What the client has printed, or why there is nothing.
    pub(crate) result: Result<Value, String>,
}

impl Results {
    pub(crate) fn new(arguments: &Arguments, contenders: &Contenders, places: &Places) -> Self {
        let command: Vec<String> = std::env::args().skip(1).collect();
        let missing = contenders.missing.iter();
        let known = contenders.all().iter().map(|contender| Known {
            name: contender.name.clone(),
            family: contender.family.clone(),
            is_qemu: contender.kind.is_qemu(),
            is_peer: contender.kind.is_peer(),
        });
        Self {
            date: machine::date(),
            command: ["make versus".to_owned()]
                .into_iter()
                .chain(command)
                .collect::<Vec<_>>()
                .join(" "),
            rounds: arguments.rounds(),
            runtime: arguments.runtime(),
            took: 0.0,
            machine: machine::describe(arguments),
            versions: contenders.versions.clone(),
            missing: missing
                .map(|missing| (missing.name.clone(), missing.remedy.clone()))
                .collect(),
            preparation: places.preparation.clone(),
            contenders: known.collect(),
            records: Vec::new(),
        }
    }

    /// What [`save`](Self::save) has written.
    pub(crate) fn load(file: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(file)
            .map_err(|error| format!("--from {}: {error}", file.display()))?;
        let results = serde_json::from_str(&text)
            .map_err(|error| format!("--from {}: {error}", file.display()))?;
        Ok(results)
    }

    pub(crate) fn save(&self, directory: &Path) -> Result<(), Error> {
        fs::create_dir_all(directory)?;
        let file = directory.join("results.json");
        // Whole or not at all: a run of minutes may be interrupted.
        let unfinished = file.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(&unfinished, &file)?;
        Ok(())
    }

    pub(crate) fn failures(&self) -> impl Iterator<Item = (&Record, &str)> {
        self.records
            .iter()
            .filter_map(|record| Some((record, record.result.as_ref().err()?.as_str())))
    }
}
