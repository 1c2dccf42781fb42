//! Who holds a file: a hint that lies beside it, for messages only. The lock is the truth.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A hint is at most this long; what follows is not ours.
const HINT_BYTES_MAX: u64 = 512;

/// What is known of the process that holds a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Its number; `None` when nobody left a hint.
    pub process: Option<u32>,
    /// Its command, as the kernel names it.
    pub command: String,
    /// Local time at which it took the file, as `2026-11-23 14:02:11`.
    pub since: String,
    /// Whether it is known to be gone: then its last writes are landing, or a process that it started
    /// has the file open.
    pub has_ended: bool,
}

impl Owner {
    /// What the hint beside `path` says.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let mut text = String::new();
        let read = not_waiting(OpenOptions::new().read(true))
            .open(hint_path(path))
            .and_then(|file| file.take(HINT_BYTES_MAX).read_to_string(&mut text));
        read.ok().and_then(|_| Self::parse(&text)).unwrap_or_default()
    }

    /// Writes the hint of this process beside `path`.
    pub(super) fn leave(path: &Path) -> io::Result<()> {
        let process = std::process::id();
        let command = fs::read("/proc/self/comm").unwrap_or_default();
        let command: String =
            String::from_utf8_lossy(&command).chars().filter(|c| !c.is_control()).collect();
        let since = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string();
        let owner = Self { process: Some(process), command, since, has_ended: false };
        // The second line tells this very process from a later one of the same number, and one of
        // another container from one that has ended.
        let start = start_of(process).ok().flatten().unwrap_or_default();
        let hint = format!("{owner}\n{} {start}\n", namespace().unwrap_or_default());
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        not_waiting(&mut options).open(hint_path(path))?.write_all(hint.as_bytes())
    }

    /// Takes the hint away.
    pub(super) fn forget(path: &Path) {
        let _ = fs::remove_file(hint_path(path));
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        // It goes to terminals: no control characters, whoever wrote it.
        let first: String = lines.next()?.chars().filter(|c| !c.is_control()).collect();
        let (process, rest) = first.strip_prefix("process ")?.split_once(" (")?;
        let (command, since) = rest.rsplit_once(") since ")?;
        let process = process.parse().ok()?;
        let has_ended = lines.next().and_then(|line| line.split_once(' ')).is_some_and(
            |(of_namespace, start)| {
                namespace().is_some_and(|ours| ours == of_namespace)
                    && start_of(process)
                        .is_ok_and(|found| found.is_none_or(|found| found != start.trim()))
            },
        );
        Some(Self {
            process: Some(process),
            command: command.into(),
            since: since.into(),
            has_ended,
        })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { process, command, since, has_ended } = self;
        match process {
            None => write!(f, "another process"),
            Some(process) if *has_ended => write!(
                f,
                "a process that has ended (process {process} ({command}) since {since}), its last writes are landing"
            ),
            Some(process) => write!(f, "process {process} ({command}) since {since}"),
        }
    }
}

/// Neither follows a link nor waits for the other end of a pipe that somebody put there.
fn not_waiting(options: &mut OpenOptions) -> &mut OpenOptions {
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
}

/// Where the hint about `path` lies.
pub(super) fn hint_path(path: &Path) -> PathBuf {
    let mut name = path.to_path_buf().into_os_string();
    name.push(".owner");
    name.into()
}

/// The namespace in which our process numbers mean something.
fn namespace() -> Option<String> {
    fs::read_link("/proc/self/ns/pid").ok().map(|link| link.to_string_lossy().into_owned())
}

/// When a process started, in the kernel's ticks since boot; `None` when it is gone or a zombie.
fn start_of(process: u32) -> io::Result<Option<String>> {
    let stat = match fs::read(format!("/proc/{process}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Fields 3 (state) and 22 (start) of proc(5), counted from behind the command in parentheses.
    let stat = String::from_utf8_lossy(&stat);
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let is_gone = fields.next().is_none_or(|state| matches!(state, "Z" | "X"));
    Ok(fields.nth(18).filter(|_| !is_gone).map(str::to_owned))
}

#[cfg(test)]
mod tests;
