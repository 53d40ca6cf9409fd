//! Who makes the load: `blk-dataplane bench`, fio, a bare loop. Each prints JSON.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::backend::last_of;
use super::rows::Load;
use super::sample;

/// How long a client may take beyond the time it was told to.
const SLACK: Duration = Duration::from_secs(30);

/// How often it is looked whether it has ended: seldom, for it takes processor time from who is measured.
const LOOK: Duration = Duration::from_millis(10);

/// The load generator's command. `pid`: the back-end's, or `$!`.
pub(crate) fn load_generator(
    program: &Path,
    load: &Load,
    sockets: &[PathBuf],
    pid: &str,
    cpu: usize,
    runtime: f64,
    ramp_time: f64,
) -> Vec<String> {
    let mut words = vec![program.display().to_string(), "bench".to_owned()];
    for socket in sockets {
        words.extend(["--socket-path".to_owned(), socket.display().to_string()]);
    }
    let mut add = |name: &str, value: String| words.extend([format!("--{name}"), value]);
    add("rw", load.rw.to_owned());
    add("bs", load.bs.to_owned());
    add("iodepth", load.depth.to_string());
    if let Some(thinktime) = load.thinktime {
        add("thinktime", thinktime.to_owned());
    }
    if let Some(rate) = load.rate {
        add("rate-iops", rate.to_string());
    }
    if load.memory_regions > 1 {
        add("memory-regions", load.memory_regions.to_string());
    }
    add("runtime", runtime.to_string());
    add("ramp-time", ramp_time.to_string());
    add("cpus", cpu.to_string());
    add("backend-pid", pid.to_owned());
    add("output-format", "json".to_owned());
    if load.polls {
        // A client that polls is to take as little of the time as it can.
        words.extend(["--poll".to_owned(), "--gtod-reduce".to_owned()]);
    }
    words
}

/// Runs it to its end, which should come after about that long, and returns what it has printed.
pub(crate) fn run(words: &[String], takes: Duration, scratch: &Path) -> Result<Value, String> {
    let (out, log) = (scratch.join("client.json"), scratch.join("client.log"));
    let mut child = start(words, &out, &log)?;
    let deadline = Instant::now() + takes + SLACK;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!(
                "the client has not ended {} s after its time: {}",
                SLACK.as_secs(),
                last_of(&log)
            ));
        }
        thread::sleep(LOOK);
    };
    let printed = fs::read_to_string(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    if !status.success() {
        return Err(format!("the client failed ({status}): {}", last_of(&log)));
    }
    parse(&printed)
}

/// Starts it with what it prints in `out`.
pub(crate) fn start(words: &[String], out: &Path, log: &Path) -> Result<Child, String> {
    let file = |path: &Path| File::create(path).map_err(|e| format!("{}: {e}", path.display()));
    Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(file(out)?)
        .stderr(file(log)?)
        .spawn()
        .map_err(|e| format!("{}: {e}", words[0]))
}

/// fio prints notes before its JSON, now and then.
fn parse(printed: &str) -> Result<Value, String> {
    let json = printed.find('{').map_or(printed, |start| &printed[start..]);
    let value: Value =
        serde_json::from_str(json).map_err(|e| format!("the client printed no JSON: {e}"))?;
    sample::check(&value)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Result<Value, String> {
        let scratch = tempfile::tempdir().unwrap();
        let words = ["sh", "-c", script].map(str::to_owned);
        run(&words, Duration::ZERO, scratch.path())
    }

    #[test]
    fn what_a_client_prints_is_its_result() {
        assert_eq!(sh(r#"echo '{"iops": 3}'"#).unwrap()["iops"], 3);
        assert_eq!(sh(r#"echo note; echo '{"iops": 3}'"#).unwrap()["iops"], 3);
    }

    #[test]
    fn a_client_that_fails_or_has_errors_or_prints_nonsense_is_a_failure() {
        assert!(sh("echo gone >&2; exit 1").unwrap_err().contains("gone"));
        assert!(sh(r#"echo '{"errors": 2}'"#).unwrap_err().contains('2'));
        assert!(sh("echo hello").unwrap_err().contains("no JSON"));
        assert!(
            run(
                &["/nonexistent".to_owned()],
                Duration::ZERO,
                Path::new("/tmp")
            )
            .is_err()
        );
    }

    #[test]
    fn the_load_generator_is_told_the_load() {
        let load = Load {
            rw: "randread",
            bs: "4k",
            depth: 32,
            polls: true,
            thinktime: Some("2us"),
            rate: Some(5000),
            devices: 2,
            memory_regions: 509,
        };
        let sockets = ["/a".into(), "/b".into()];
        let words = load_generator(Path::new("x"), &load, &sockets, "$!", 1, 1.0, 0.2);
        assert_eq!(
            words.join(" "),
            "x bench --socket-path /a --socket-path /b --rw randread --bs 4k --iodepth 32 --thinktime 2us \
             --rate-iops 5000 --memory-regions 509 --runtime 1 --ramp-time 0.2 --cpus 1 --backend-pid $! \
             --output-format json --poll --gtod-reduce"
        );
    }
}
