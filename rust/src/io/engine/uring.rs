//! The fast engine: one io_uring, driven by one thread that owns it.
//!
//! The in-flight table owns slot and file of every operation until the kernel has reported its end.
//! Dropping the engine drains the ring first; what cannot be drained is leaked, never freed, because
//! closing a ring does not wait for requests that the kernel already has.

use std::fs::File;
use std::io::{self, Write as _};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded, unbounded};
use io_uring::{IoUring, Probe, opcode};
use rustix::event::EventfdFlags;

use crate::error::{Error, Result};
use crate::io::engine::uring::driver::{Command, Driver};
use crate::io::engine::{Counters, Engine, Request};
use crate::io::fork::NotInherited;
use crate::memory::slot::Region;

mod driver;
mod trial;

pub use driver::Tuning;

/// io_uring behind one thread.
#[derive(Debug)]
pub struct Uring {
    commands: Option<Sender<Command>>,
    wake: Arc<File>,
    driver: Option<JoinHandle<()>>,
    counters: Arc<Counters>,
    process: u32,
}

impl Uring {
    /// Sets a ring up for so many drives, starts its thread, and moves a few bytes through it: there are
    /// sandboxes where a ring can be set up and every operation fails. One ring serves all drives, so that
    /// memory is registered, and counted against the limit of locked memory, once.
    ///
    /// # Errors
    /// `Unsupported` with the kernel's reason when there is no usable ring here.
    pub fn start(drives: usize) -> Result<Self> {
        let tuning = Tuning::default();
        Self::start_with(Tuning { depth: tuning.depth * drives.max(1), ..tuning })
    }

    /// The same, tuned; for benchmarks.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_with(tuning: Tuning) -> Result<Self> {
        let mut engine = Self::start_untried(tuning)?;
        match trial::run(&engine, trial::PATIENCE) {
            Ok(()) => Ok(engine),
            Err(trial::Failure { reason, is_stuck }) => {
                if is_stuck {
                    // Nobody waits for what may never end: the driver drains for a minute, then leaks.
                    drop(engine.driver.take());
                }
                Err(Error::Unsupported { feature: "io_uring".into(), reason })
            }
        }
    }

    fn start_untried(tuning: Tuning) -> Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|e| unsupported("eventfd", &e.into()))?;
        let wake = Arc::new(File::from(wake));
        let (commands, inbox) = unbounded();
        let counters = Arc::new(Counters::default());
        let (ready, started) = bounded(1);
        let for_driver = (Arc::clone(&wake), Arc::clone(&counters));
        let driver = std::thread::Builder::new()
            .name("mt-uring".into())
            .spawn(move || {
                // Made here, because a ring set up for a single issuer belongs to the thread that made it.
                let made = set_up(tuning).and_then(|ring| Ok((NotInherited::new(&ring)?, ring)));
                match made {
                    Ok((not_inherited, ring)) => {
                        let _ = ready.send(Ok(()));
                        // Not dropped unless drained, also when it panics.
                        let (wake, counters) = for_driver;
                        let mut driver =
                            ManuallyDrop::new(Driver::new(ring, inbox, wake, counters, tuning));
                        driver.run();
                        if !driver.is_drained() {
                            // The ring stays open, so a child must still not inherit it.
                            std::mem::forget(not_inherited);
                        } else {
                            drop(not_inherited);
                            drop(ManuallyDrop::into_inner(driver));
                        }
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })
            .map_err(|e| Error::io("start a thread of", "this process", 0, 0, e))?;
        match started.recv() {
            Ok(Ok(())) => Ok(Self {
                commands: Some(commands),
                wake,
                driver: Some(driver),
                counters,
                process: std::process::id(),
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::invalid("the I/O thread ended before its ring was set up")),
        }
    }

    fn send(&self, command: Command) {
        let Some(commands) = &self.commands else { return };
        if let Err(refused) = commands.send(command) {
            if let Command::Submit(request) = refused.into_inner() {
                request.complete(Err(Error::invalid("the engine has stopped")));
            }
        } else {
            self.ring_the_bell();
        }
    }

    fn ring_the_bell(&self) {
        // An eventfd refuses only when its counter is about to overflow: then the bell is ringing.
        let _ = (&*self.wake).write_all(&1_u64.to_le_bytes());
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn submit(&self, request: Request) {
        match request.validate() {
            Ok(()) => self.send(Command::Submit(request)),
            Err(error) => request.complete(Err(error)),
        }
    }

    fn register(&self, region: &Arc<Region>) -> Result<(), String> {
        let (reply, answer) = bounded(1);
        self.send(Command::Register(Arc::clone(region), reply));
        answer.recv().unwrap_or_else(|_| Err("the engine has stopped".into()))
    }

    fn unregister(&self) {
        let (reply, answer) = bounded(1);
        self.send(Command::Unregister(reply));
        let _ = answer.recv();
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A fork has no driver thread to wait for.
            std::mem::forget(self.driver.take());
            return;
        }
        self.commands = None;
        self.ring_the_bell();
        if let Some(driver) = self.driver.take() {
            let _ = driver.join();
        }
    }
}

fn unsupported(what: &str, source: &io::Error) -> Error {
    let hint = match source.raw_os_error() {
        Some(code) if code == rustix::io::Errno::PERM.raw_os_error() => {
            " (a container's seccomp profile or the sysctl kernel.io_uring_disabled forbids it)"
        }
        Some(code) if code == rustix::io::Errno::NOSYS.raw_os_error() => {
            " (the kernel or the container runtime does not know it)"
        }
        _ => "",
    };
    Error::Unsupported { feature: "io_uring".into(), reason: format!("{what}: {source}{hint}") }
}

fn set_up(tuning: Tuning) -> Result<IoUring> {
    let entries = u32::try_from(2 * tuning.depth).unwrap_or(128);
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_single_issuer().setup_coop_taskrun();
    let ring = builder
        .build(entries)
        .or_else(|error| match error.raw_os_error() {
            // Kernels before 6.0 do not know these flags.
            Some(code) if code == rustix::io::Errno::INVAL.raw_os_error() => {
                IoUring::builder().dontfork().build(entries)
            }
            _ => Err(error),
        })
        .map_err(|e| unsupported("io_uring_setup", &e))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|e| unsupported("io_uring_register", &e))?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::ReadFixed::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
    ];
    let parameters = ring.params();
    if !parameters.is_feature_nodrop()
        || !parameters.is_feature_ext_arg()
        || !needed.iter().all(|code| probe.is_supported(*code))
    {
        let reason = "the kernel's io_uring is older than 5.11".into();
        return Err(Error::Unsupported { feature: "io_uring".into(), reason });
    }
    Ok(ring)
}

#[cfg(test)]
mod tests;
