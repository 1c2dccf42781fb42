//! `kill -9` at any moment: the store opens at a whole step, no earlier than the last one that was
//! acknowledged and no later than the last one that was finished, with the bits of the same training
//! in memory.
//!
//! The process that is killed is this very program, started again for one test, [`CHILD`], with a
//! variable that says what to train. It says what it does, line by line, in a pipe, which keeps
//! what was written to it when the writer dies: what the parent reads is exact.

use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use megatrain_io::io::{Choice, start};
use megatrain_io::memory::Ledger;
use megatrain_io::pipeline::{After, GradientFiles, Kind, Options, Pipeline, Residents};
use megatrain_io::store::{OpenOptions, Store};
use megatrain_io::{Error, Unit, to_usize};

use training::{LARGE, Memory, SMALL, Shape, WIDE, adamw, gradient, gradient_scale, schedule};

#[path = "kill/training.rs"]
mod training;

const CHILD: &str = "a_child_trains_until_it_is_killed";
const VARIABLE: &str = "MEGATRAIN_KILL_CHILD";
const LONG: Duration = Duration::from_secs(60);

/// What one child is to do.
#[derive(Clone, Copy, Debug)]
struct Life {
    engine: Choice,
    shape: Shape,
    commit_every: u64,
    /// Whether each step is awaited; else the next one begins while it is committed.
    waits: bool,
    policy: UpdatePolicy,
    /// In which units weights and gradients go to and fro.
    unit: Unit,
}

/// When updates are made that need the norm of all gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UpdatePolicy {
    Immediate,
    /// By the next step.
    Deferred,
    /// At once, and taken back if the norm is too large.
    Speculative,
}

const POLICIES: [UpdatePolicy; 3] =
    [UpdatePolicy::Immediate, UpdatePolicy::Deferred, UpdatePolicy::Speculative];

impl Life {
    fn encode(&self, path: &Path) -> String {
        let engine = if self.engine == Choice::Uring { "uring" } else { "threads" };
        let (every, waits) = (self.commit_every, self.waits);
        let policy = self.policy as usize;
        let (unit, shape) = (self.unit.name(), self.shape.name);
        format!("{engine} {shape} {every} {waits} {policy} {unit} {}", path.display())
    }

    fn decode(text: &str) -> (Self, PathBuf) {
        let parts: Vec<&str> = text.splitn(7, ' ').collect();
        let [engine, shape, every, waits, policy, unit, path] = parts[..] else {
            panic!("{VARIABLE} is {text}")
        };
        let shape = [SMALL, LARGE, WIDE].into_iter().find(|s| s.name == shape).expect("a shape");
        let life = Self {
            engine: if engine == "uring" { Choice::Uring } else { Choice::Threads },
            shape,
            commit_every: every.parse().expect("a number"),
            waits: waits.parse().expect("true or false"),
            policy: POLICIES[policy.parse::<usize>().expect("a number")],
            unit: Unit::named(unit).expect("record or chunk"),
        };
        (life, path.into())
    }

    fn open(&self, path: &Path) -> Result<Store, Error> {
        Store::open(
            &self.shape.files(path),
            OpenOptions { engine: self.engine, ..OpenOptions::default() },
            &Ledger::new(),
        )
    }

    /// Trains, and says so, until the process dies.
    fn train(&self, path: &Path) -> Result<(), Error> {
        let store = Arc::new(self.open(path)?);
        let gradients: &[Kind] = match self.policy {
            UpdatePolicy::Immediate => &[Kind::Update],
            UpdatePolicy::Deferred => &[Kind::Defer],
            UpdatePolicy::Speculative => &[Kind::Update, Kind::Defer],
        };
        let unit = self.unit;
        let schedules =
            [Kind::Load, Kind::Apply].map(|first| schedule(&store, unit, first, gradients));
        let mut waiting = false;
        let (pool, tensors) = (self.shape.pool(unit), self.shape.settings());
        let units = |record: usize| match unit {
            Unit::Chunk => store.layout().records()[record].clone(),
            Unit::Record => record..record + 1,
        };
        // Half of the state stays in RAM where several steps share a commit.
        let half = |count: usize| (0..count).step_by(2).filter(|_| self.commit_every > 1).collect();
        let chunks = store.layout().chunks();
        let mut residents =
            Residents { records: half(3), chunks: half(chunks.len()), gradients: vec![] };
        residents.records = residents.records.into_iter().flat_map(units).collect();
        residents.chunks.retain(|chunk| chunks[*chunk].format().is_trainable());
        let mut gradient_files = GradientFiles::default();
        if self.policy != UpdatePolicy::Immediate {
            // The others wait on the drive.
            residents.gradients = units(1).collect();
            let paths: Vec<_> = self.shape.files(&path.with_file_name("gradients"));
            gradient_files =
                GradientFiles::create(&paths, store.units(unit), &residents.gradients)?;
        }
        let options =
            Options { pool, threads: 2, kernel: None, tensors, residents, gradient_files, unit };
        let pipeline = Pipeline::start(Arc::clone(&store), &options)?;
        // The harness leaves its first line open.
        say("");
        let mut acknowledged = step_of(&store);
        say(&format!("opened {acknowledged}"));
        let mut say_acknowledged = || {
            let committed = step_of(&store);
            if committed > acknowledged {
                acknowledged = committed;
                say(&format!("acknowledged {committed}"));
            }
        };
        for step in step_of(&store) + 1.. {
            let commit = (step % self.commit_every == 0).then(|| format!("step {step}"));
            let schedule = &schedules[usize::from(waiting)];
            let scale = gradient_scale(step);
            pipeline.begin(Arc::clone(schedule), adamw(step), commit.is_some())?;
            for unit in (0..3).flat_map(units) {
                drop(pipeline.take_weights(unit, LONG)?.expect("in time"));
                say_acknowledged();
            }
            for record in (0..3).rev() {
                self.train_record(&pipeline, record, units(record), step, &mut say_acknowledged)?;
            }
            if commit.is_some() {
                say(&format!("ending {step}"));
            }
            waiting = match self.policy {
                UpdatePolicy::Immediate => false,
                UpdatePolicy::Deferred => true,
                UpdatePolicy::Speculative => scale < 1.0,
            };
            let after = if waiting { After::Applied(scale) } else { After::Stands };
            pipeline.end(commit.map(String::into_bytes), after)?;
            if self.waits && !waiting {
                assert!(pipeline.wait_durable(LONG)?, "not durable in time");
            }
            say_acknowledged();
        }
        Ok(())
    }
}

impl Life {
    /// The backward pass of one record. By chunk its weights are elsewhere meanwhile, all of them.
    fn train_record(
        &self,
        pipeline: &Pipeline,
        record: usize,
        units: Range<usize>,
        step: u64,
        say_acknowledged: &mut impl FnMut(),
    ) -> Result<(), Error> {
        let mut away = Vec::new();
        for unit in units.clone() {
            let slot = pipeline.take_weights(unit, LONG)?.expect("in time");
            let stays = pipeline.pool().residents.weights_of(unit).is_some();
            let goes = self.unit == Unit::Chunk && !stays;
            away.push(if goes { Err(slot.to_vec()) } else { Ok(slot) });
        }
        for (unit, weights) in units.clone().zip(away) {
            let weights = match weights {
                Ok(slot) => Some(slot),
                // They need not come back if they are not updated yet.
                Err(_) if self.policy == UpdatePolicy::Deferred => None,
                Err(bytes) => {
                    let mut slot = pipeline.take_outgoing(unit, LONG)?.expect("in time");
                    slot.copy_from_slice(&bytes);
                    Some(slot)
                }
            };
            let first =
                if self.unit == Unit::Chunk { self.shape.start_of(unit - units.start) } else { 0 };
            let parameters = to_usize(pipeline.units().record_parameters(unit));
            // Halving is exact: who updates at once may as well be given gradients that are clipped.
            let is_at_once = self.policy == UpdatePolicy::Immediate;
            let scale = if is_at_once { gradient_scale(step) } else { 1.0 };
            let mut buffer = pipeline.take_gradient(unit, LONG)?.expect("in time");
            for (index, bytes) in buffer.chunks_mut(4).take(parameters).enumerate() {
                let value = scale * gradient(step, record, first + index);
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            pipeline.submit(unit, weights, buffer)?;
            say_acknowledged();
        }
        Ok(())
    }
}

/// The step that the committed blob names; an empty blob is that of the creation.
fn step_of(store: &Store) -> u64 {
    let blob = store.committed().blob;
    let text = std::str::from_utf8(&blob).expect("text");
    text.strip_prefix("step ").map_or(0, |step| step.parse().expect("a number"))
}

/// One line, in one write: it is in the pipe as a whole, or not said. Fails when nobody listens.
fn say(line: &str) {
    std::io::stdout().write_all(format!("{line}\n").as_bytes()).expect("the parent listens");
}

/// What the parent says about the test itself.
fn report(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// What was left of a child.
struct Death {
    store: Store,
    /// The last step that it knew to be durable.
    acknowledged: u64,
    /// The last step that it finished, or was about to finish, with a blob.
    finished: u64,
    /// From the kill to the open store, the wait for the lock included.
    reopened: Duration,
}

/// Starts a child, kills it `pause` after it has said what `moment` waits for, and opens its store.
fn kill(life: &Life, path: &Path, pause: Duration, mut moment: impl FnMut(&str) -> bool) -> Death {
    let program = std::env::current_exe().expect("a path");
    let mut child = Command::new(program)
        .args(["--exact", CHILD, "--nocapture"])
        .env(VARIABLE, life.encode(path))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut said = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let (mut acknowledged, mut finished) = (0, 0);
    // Whether the line is the child's: the harness says something, too.
    let mut note = |line: &str| {
        match line.split_once(' ').map(|(what, step)| (what, step.parse())) {
            Some(("opened", Ok(step))) => (acknowledged, finished) = (step, step),
            Some(("acknowledged", Ok(step))) => acknowledged = step,
            Some(("ending", Ok(step))) => finished = step,
            _ => return false,
        }
        true
    };
    loop {
        let line = said.next().expect("the child died of itself").expect("text");
        if note(&line) && moment(&line) {
            break;
        }
    }
    let start = Instant::now();
    while start.elapsed() < pause {
        std::hint::spin_loop();
    }
    child.kill().expect("killed");
    // Not awaited before, as by a user who starts again at once: only the lock keeps the two apart.
    let start = Instant::now();
    let store = life.open(path).unwrap_or_else(|e| panic!("{life:?}: {e}"));
    let reopened = start.elapsed();
    for line in said {
        note(&line.expect("text"));
    }
    let status = child.wait().expect("gone");
    assert_eq!(status.signal(), Some(9), "the child ended by itself: {status}");
    Death { store, acknowledged, finished, reopened }
}

/// Whether the kernel lets us have this engine.
fn is_refused(engine: Choice) -> bool {
    let refused = start(engine, 1).err();
    if let Some(error) = &refused {
        report(&format!("skipped: no engine, no kills: {error}"));
    }
    refused.is_some()
}

fn kills(engine: Choice, shape: Shape, count: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let options = OpenOptions { engine, ..OpenOptions::default() };
    drop(
        Store::create_empty(&shape.files(&path), shape.manifest(), options, &Ledger::new())
            .expect("created"),
    );
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut memory = Memory::new(&shape);
    let (mut generation, mut survived, mut lost) = (1, 0, 0);
    let mut slowest = Duration::ZERO;
    let start = Instant::now();
    for kill_number in 1..=count {
        let mut life = Life {
            engine,
            shape,
            commit_every: [1, 3][random.usize(0..2)],
            waits: random.bool(),
            policy: POLICIES[random.usize(..3)],
            unit: if random.u8(..3) == 0 { Unit::Chunk } else { Unit::Record },
        };
        if life.policy == UpdatePolicy::Speculative {
            life.commit_every = 1; // what is taken back lies beside a committed state
        }
        let pause = Duration::from_micros(random.u64(0..10_000));
        let mut lines = random.u32(1..16);
        let death = kill(&life, &path, pause, |_| {
            lines -= 1;
            lines == 0
        });
        let what = format!("seed {seed}, kill {kill_number}, {life:?}");
        let Death { store, acknowledged, finished, reopened } = death;
        let (before, step) = (memory.step, step_of(&store));
        assert!(
            step >= acknowledged,
            "{what}: step {acknowledged} was acknowledged and is gone; the store is at {step}"
        );
        assert!(
            step <= finished,
            "{what}: step {step} was not finished; the last that was is {finished}"
        );
        let every = life.commit_every;
        assert!(step == before || step.is_multiple_of(every), "{what}: step {step} had no blob");
        generation += step / every - before / every;
        assert_eq!(store.committed().generation, generation, "{what}: one for each commit");
        assert_eq!(store.fell_back_from(), None, "{what}: a kill tears no page");
        let report = store.verify(&mut |_, _| true).expect("read");
        assert!(report.damaged.is_empty(), "{what}: {report:?}");
        memory.train_to(step);
        memory.assert_is(&store, &what);
        survived += u64::from(step > acknowledged);
        lost += u64::from(step < finished);
        slowest = slowest.max(reopened);
    }
    report(&format!(
        "{count} kills over {engine:?}, store {}: {} steps, {} generations in {:.1} s; {survived} \
         times a step was durable that was not acknowledged yet, {lost} times a finished step was \
         lost; open again after {slowest:.0?} at most",
        shape.name,
        memory.step,
        generation,
        start.elapsed().as_secs_f64(),
    ));
}

/// Not a test: what the others start and kill.
#[test]
fn a_child_trains_until_it_is_killed() {
    if let Ok(text) = std::env::var(VARIABLE) {
        let (life, path) = Life::decode(&text);
        life.train(&path).expect("trained");
    }
}

#[test]
fn a_hundred_kills_over_threads_lose_only_what_was_not_acknowledged() {
    kills(Choice::Threads, SMALL, 70);
    kills(Choice::Threads, LARGE, 30);
}

#[test]
fn a_hundred_kills_over_uring_lose_only_what_was_not_acknowledged() {
    if !is_refused(Choice::Uring) {
        kills(Choice::Uring, SMALL, 70);
        kills(Choice::Uring, LARGE, 30);
    }
}

#[test]
fn the_store_opens_again_while_writes_of_the_killed_process_land() {
    for engine in [Choice::Uring, Choice::Threads] {
        if is_refused(engine) {
            continue;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let options = OpenOptions { engine, ..OpenOptions::default() };
        Store::create_empty(&WIDE.files(&path), WIDE.manifest(), options, &Ledger::new())
            .expect("created");
        let mut memory = Memory::new(&WIDE);
        let (mut slowest, mut in_flight) = (Duration::ZERO, 0);
        for _ in 0..4 {
            let policy = UpdatePolicy::Immediate;
            let unit = if fastrand::bool() { Unit::Chunk } else { Unit::Record };
            let life = Life { engine, shape: WIDE, commit_every: 1, waits: false, policy, unit };
            let pause = Duration::from_micros(fastrand::u64(0..20_000));
            // The second step of a life ends: the first is committed, this one is being written.
            let mut endings = 0;
            let death = kill(&life, &path, pause, |line| {
                endings += u32::from(line.starts_with("ending"));
                endings == 2
            });
            let step = step_of(&death.store);
            assert!((death.acknowledged..=death.finished).contains(&step));
            memory.train_to(step);
            memory.assert_is(&death.store, &format!("{life:?}"));
            slowest = slowest.max(death.reopened);
            in_flight += u32::from(step < death.finished);
        }
        report(&format!(
            "{in_flight} of 4 kills over {engine:?} amid the writes of a step; open again after \
             {slowest:.0?} at most"
        ));
    }
}
