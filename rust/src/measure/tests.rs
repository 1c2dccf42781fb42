//! Bytes are counted exactly, and nothing is left behind. No test looks at a time.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::error::Error;
use crate::io::engine::Engine;
use crate::io::engine::choice::{Choice, start};
use crate::io::engine::faulty::{Fault, Faulty, Plan, Point};

const MIB: u64 = 1 << 20;

fn threads() -> Arc<dyn Engine> {
    start(Choice::Threads, 1).expect("an engine").0
}

fn made(bytes: u64) -> (tempfile::TempDir, ScratchFile) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = ScratchFile::create(folder.path(), bytes).expect("a file");
    (folder, file)
}

fn run(file: &ScratchFile, traffic: Traffic, form: Form, bytes: u64) -> Figure {
    let transfers = Transfers::new(&threads(), form).expect("slots");
    transfers.run(file, traffic, 0, Limit::bytes(bytes)).expect("transferred")
}

#[test]
fn nothing_is_left_behind_while_it_runs_and_after_a_refusal() {
    let (folder, file) = made(3 * MIB - 5);
    let entries = || std::fs::read_dir(folder.path()).expect("read").count();
    assert_eq!((file.bytes(), entries()), (3 * MIB, 0));
    let refused = ScratchFile::create(folder.path(), 1 << 60).expect_err("no drive is so large");
    assert!(matches!(refused, Error::NoSpace { .. }), "{refused}");
    assert_eq!(entries(), 0);
    drop(file);
    assert_eq!(entries(), 0);
}

#[test]
fn reads_and_writes_are_counted_to_the_byte_also_round_and_round() {
    let (_folder, file) = made(4 * MIB);
    file.fill(&threads()).expect("filled");
    let form = Form { bytes: 1 << 20, depth: 3 };
    let written = run(&file, Traffic::Write, form, 10 * MIB);
    assert_eq!((written.read, written.written), (0, 10 * MIB));
    let read = run(&file, Traffic::Read, form, 9 * MIB + 1);
    assert_eq!((read.read, read.written), (10 * MIB, 0));
    file.verify(&threads()).expect("whole");
}

#[test]
fn mixed_traffic_is_fourteen_to_twelve() {
    let (_folder, file) = made(28 * MIB);
    file.fill(&threads()).expect("filled");
    let mixed = run(&file, Traffic::Mixed, Form { bytes: 1 << 20, depth: 4 }, 26 * MIB);
    assert_eq!((mixed.read, mixed.written), (14 * MIB, 12 * MIB));
    file.verify(&threads()).expect("whole");
}

#[test]
fn the_traffic_of_training_is_fourteen_to_twelve_in_its_extents() {
    let (_folder, file) = made(2 * TRAINING_CYCLE_BYTES);
    let engine = threads();
    file.fill(&engine).expect("filled");
    let transfers = Transfers::for_training(&engine, 2).expect("slots");
    let limit = Limit::bytes(3 * 52 * MIB);
    let figure = transfers.run(&file, Traffic::Training, 0, limit).expect("transferred");
    assert_eq!((figure.read, figure.written), (3 * 28 * MIB, 3 * 24 * MIB));
    file.verify(&engine).expect("whole");
}

#[test]
fn the_time_limit_ends_a_run() {
    let (_folder, file) = made(MIB);
    let transfers = Transfers::new(&threads(), Form { bytes: 1 << 20, depth: 1 }).expect("slots");
    let limit = Limit { bytes: u64::MAX, time: Duration::ZERO };
    let figure = transfers.run(&file, Traffic::Write, 0, limit).expect("ended");
    assert_eq!(figure.bytes(), 0);
}

#[test]
fn what_does_not_fit_or_was_never_written_is_an_error() {
    let (_folder, file) = made(MIB);
    let engine = threads();
    assert!(Transfers::new(&engine, Form { bytes: 4096, depth: 1 }).is_err());
    assert!(Transfers::new(&engine, Form { bytes: 1 << 20, depth: 0 }).is_err());
    let transfers = Transfers::for_training(&engine, 1).expect("slots");
    assert!(transfers.run(&file, Traffic::Training, 0, Limit::bytes(1)).is_err());
    let text = file.verify(&engine).expect_err("never written").to_string();
    assert!(text.contains("the MiB at offset 0 is not what was written"), "{text}");
}

#[test]
fn a_failed_transfer_is_an_error_and_not_a_figure() {
    let (_folder, file) = made(4 * MIB);
    let plan = Plan { faults: vec![(Point::Any(1), Fault::Fail(5))], ..Plan::default() };
    let engine: Arc<dyn Engine> = Arc::new(Faulty::over(threads(), plan));
    let transfers = Transfers::new(&engine, Form { bytes: 1 << 20, depth: 2 }).expect("slots");
    let refused = transfers.run(&file, Traffic::Write, 0, Limit::bytes(4 * MIB));
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    // All slots are back: the next run is whole.
    let figure = transfers.run(&file, Traffic::Write, 0, Limit::bytes(4 * MIB)).expect("written");
    assert_eq!(figure.written, 4 * MIB);
}

#[test]
fn each_flush_is_timed_and_the_contents_stay() {
    let (_folder, file) = made(16 * MIB);
    let engine = threads();
    file.fill(&engine).expect("filled");
    let found = file.flush_latency(&engine, 5, Duration::MAX).expect("flushed");
    assert_eq!((found.sync.len(), found.durable_write.len()), (5, 5));
    file.verify(&engine).expect("whole");
}

#[test]
fn workloads_count_what_they_move() {
    let bytes = |name| {
        let figure = Workload::named(name, 8192, None).expect("memory").run();
        (figure.read, figure.written)
    };
    assert_eq!(bytes("copy"), (32768, 32768));
    assert_eq!(bytes("update"), (32768, 32768));
    assert_eq!(bytes("checksum"), (32768, 0));
    assert_eq!(bytes("adamw f32"), (16 * 8192, 12 * 8192));
    assert_eq!(bytes("adamw split"), (16 * 8192, 12 * 8192));
    assert_eq!(bytes("adamw f32 in place"), (16 * 8192, 12 * 8192));
    assert_eq!(bytes("adamw split in place"), (16 * 8192, 12 * 8192));
    assert!(Workload::named("dance", 8, None).is_err());
    assert!(Workload::named("copy", 8, Some("mmx")).is_err());
}

#[test]
fn a_figure_of_nothing_divides_by_nothing() {
    let nothing = Figure::default();
    assert_eq!((nothing.bytes(), nothing.gb_per_s(), nothing.cpu_s_per_gb()), (0, 0.0, 0.0));
    let second = Duration::from_secs(1);
    let figure = Figure { read: 1_500_000_000, written: 500_000_000, wall: second, cpu: second };
    assert_eq!((figure.gb_per_s(), figure.cpu_s_per_gb()), (2.0, 0.5));
}
