//! Ten thousand damages to stores at rest, in every part of the file: each is found, or it lies where
//! no current data is. What must be found is told from the bytes alone, by comparing them with what
//! was committed, and not with the store's own code.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use crate::error::Error;
use crate::io::engine::memory::Memory;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::Store;
use crate::store::header::{CLEAN_MARKER_OFFSET, HEADER_OFFSETS, SUPERBLOCK_OFFSETS};
use crate::store::tests::images::{RECORDS, State, Trained};
use crate::units::{CopyId, Group, PAGE_BYTES, StateFormat};

const DAMAGES: u64 = 10_000;
/// One in so many is done to a store whose extents have several checksums each.
const LARGE_ONE_IN: u64 = 64;
const PAGE: u64 = PAGE_BYTES as u64;

/// Stores that are damaged, and others of the same layout whose parts are put into them.
struct Stores {
    _folder: tempfile::TempDir,
    small: [Trained; 2],
    large: [Trained; 2],
}

/// What the next open must find.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    Opened {
        generation: usize,
        fell_back: bool,
        /// Positions in the table of extents that do not hold.
        damaged: Vec<usize>,
    },
}

/// How often a part was hit, and what came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    hits: u64,
    /// Hits that changed current data of the newest generation.
    current: u64,
    /// Opens after which the newest generation was not there as a whole: refused, fallen back, or
    /// with the damage reported.
    detected: u64,
    /// Opens that gave the newest generation back to the byte.
    harmless: u64,
    fell_back: u64,
}

#[test]
fn ten_thousand_damages_are_found_or_hit_nothing_that_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let large =
        [(StateFormat::F32, 132 << 10), (StateFormat::Bf16, 128), (StateFormat::Raw16, 128)];
    let small = |seed| Trained::new(folder.path(), &RECORDS, 4096, seed);
    let large = |seed| Trained::new(folder.path(), &large, 132 << 10, seed);
    let stores =
        Stores { small: [small(1), small(2)], large: [large(3), large(4)], _folder: folder };
    let all_counts = Mutex::new(BTreeMap::<&str, Counts>::new());
    let failure = (0..DAMAGES).into_par_iter().find_map_any(|seed| {
        let run = || damage_and_look(&stores, seed);
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok((part, counts))) => {
                let mut all_counts = all_counts.lock().expect("not poisoned");
                all_counts.entry(part).or_default().add(counts);
                None
            }
            Ok(Err(reason)) => Some(format!("seed {seed}: {reason}")),
            Err(_) => Some(format!("seed {seed}: a panic")),
        }
    });
    assert_eq!(failure, None);
    check_counts(&all_counts.into_inner().expect("not poisoned"));
}

/// Each record's number of updates lies in the table: no bit of it can change in silence.
#[test]
fn every_bit_of_the_tables_is_protected() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Trained::new(folder.path(), &RECORDS, 4096, 1);
    let bits = |at: u64| (0..8).map(move |bit| (at, 1_u8 << bit));
    let tables = store.header.table_offsets;
    let encoded = crate::store::Table::encoded_bytes(&store.layout) as u64;
    let places: Vec<_> =
        tables.into_iter().flat_map(|at| span(at, encoded)).flat_map(bits).collect();
    let failure = places.into_par_iter().find_map_any(|(at, bit)| {
        let drive = store.image().copy();
        drive.overwrite(at, &[drive.bytes(span(at, 1))[0] ^ bit]);
        let verdict = verdict(&drive, &store, &store);
        let is_newest = at >= tables[1];
        let expected = Verdict::Opened {
            generation: if is_newest { 2 } else { 3 },
            fell_back: is_newest,
            damaged: vec![],
        };
        let looked = look(&store, drive, &verdict);
        let is_right = verdict == expected && looked.is_ok();
        (!is_right).then(|| format!("bit {bit} at {at}: {verdict:?}, {looked:?}"))
    });
    assert_eq!(failure, None);
}

/// No part was left out, and the outcomes are those that the design promises.
fn check_counts(all_counts: &BTreeMap<&str, Counts>) {
    let all = || all_counts.values();
    let report = format!("{all_counts:#?}");
    assert_eq!(all_counts.len(), PARTS.len(), "{report}");
    assert_eq!(all().map(|t| t.hits).sum::<u64>(), DAMAGES);
    assert!(all().all(|t| t.hits > DAMAGES / 20 && t.detected + t.harmless == 2 * t.hits));
    for part in ["copy A", "copy B", "single copy", "manifest", "table", "blob"] {
        let Counts { current, detected, .. } = all_counts[part];
        assert!(current > 100, "{part}: {report}");
        assert_eq!(
            detected,
            2 * current,
            "{part}: all of what is current, and only that: {report}"
        );
    }
    for part in ["superblock", "mirror", "clean marker", "gap"] {
        assert_eq!(all_counts[part].detected, 0, "{part}: {report}");
    }
    for part in ["table", "blob", "copy A", "copy B"] {
        assert!(all_counts[part].fell_back > 50, "{part}: {report}");
    }
    for part in ["copy A", "copy B", "table", "blob"] {
        assert!(all_counts[part].harmless > 100, "{part}: older data was hit too: {report}");
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.current += other.current;
        self.detected += other.detected;
        self.harmless += other.harmless;
        self.fell_back += other.fell_back;
    }
}

/// Does one damage, opens the store after a clean stop and after another, and reads everything back.
fn damage_and_look(stores: &Stores, seed: u64) -> Result<(&'static str, Counts), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let [store, stranger] =
        if seed.is_multiple_of(LARGE_ONE_IN) { &stores.large } else { &stores.small };
    let (part, what, drive) = damage(store, stranger, &mut rng);
    let newest = &store.states[2];
    let newest_holds = (0..newest.groups.len()).all(|at| group_holds(&drive, newest, at));
    let current_hit = match part {
        "manifest" => !manifest_holds(&drive, store),
        "table" | "blob" => !root_holds(&drive, store, 3),
        _ => !newest_holds,
    };
    let mut counts = Counts { hits: 1, current: u64::from(current_hit), ..Counts::default() };
    for clean in [false, true] {
        let drive = drive.copy();
        if !clean {
            drive.overwrite(CLEAN_MARKER_OFFSET, &[0; PAGE_BYTES]);
        }
        let verdict = verdict(&drive, store, stranger);
        go_back(store, drive.copy(), &verdict)
            .and_then(|()| look(store, drive, &verdict))
            .map_err(|reason| format!("{what} in {part}, clean stop {clean}: {reason}"))?;
        match verdict {
            Verdict::Opened { generation: 3, damaged, .. } if damaged.is_empty() => {
                counts.harmless += 1;
            }
            Verdict::Opened { fell_back, .. } => {
                counts.detected += 1;
                counts.fell_back += u64::from(fell_back);
            }
            Verdict::Refused => counts.detected += 1,
        }
    }
    Ok((part, counts))
}

/// Where the newest state is opened damaged, a person may go back to the one before it if that is whole;
/// else nothing changes.
fn go_back(store: &Trained, drive: Memory, verdict: &Verdict) -> Result<(), String> {
    let Verdict::Opened { generation: 3, damaged, .. } = verdict else { return Ok(()) };
    if damaged.is_empty() {
        return Ok(());
    }
    let older = &store.states[1];
    let is_named =
        SUPERBLOCK_OFFSETS[0].iter().any(|at| drive.agrees(&older.image, *at..*at + PAGE));
    let holds = (0..older.groups.len()).all(|at| group_holds(&drive, older, at));
    let can = is_named && root_holds(&drive, store, 2) && holds;
    let (drive, before) = (Arc::new(drive.copy()), drive);
    let open = || Store::open_on(&store.drives, drive.clone(), [2; 16], &Ledger::new());
    let went = open().and_then(|opened| opened.go_back(&mut |_, _| true));
    match (went, can) {
        (Ok(Some(2)), true) => {
            let opened = open().map_err(|e| e.to_string())?;
            let is_whole = opened.verify(&mut |_, _| true).is_ok_and(|r| r.damaged.is_empty());
            let is_older =
                opened.committed().blob[..] == older.blob && opened.committed().generation == 2;
            if is_whole && is_older { Ok(()) } else { Err("went back to something else".into()) }
        }
        (Err(_), false) if drive.agrees(&before, 0..store.header.file_bytes) => Ok(()),
        (went, _) => Err(format!("going back was expected: {can}; {went:?}, or the drive changed")),
    }
}

/// Opens the store, which must end as foretold, and compares all it gives with what was committed.
fn look(store: &Trained, drive: Memory, verdict: &Verdict) -> Result<(), String> {
    let opened = Store::open_on(&store.drives, Arc::new(drive), [2; 16], &Ledger::new());
    let (opened, generation, fell_back, damaged) = match (opened, verdict) {
        (Err(Error::Format { .. } | Error::Corrupt { .. }), Verdict::Refused) => return Ok(()),
        (Ok(opened), Verdict::Opened { generation, fell_back, damaged }) => {
            (opened, *generation, *fell_back, damaged)
        }
        (opened, _) => {
            let found = opened.map(|o| (o.committed().generation, o.fell_back_from()));
            return Err(format!("{verdict:?} was expected; {found:?}"));
        }
    };
    let (committed, state) = (opened.committed(), &store.states[generation - 1]);
    if committed.generation != generation as u64
        || opened.fell_back_from() != fell_back.then_some(3)
        || committed.blob[..] != state.blob
    {
        let found = (committed.generation, opened.fell_back_from());
        return Err(format!("{verdict:?} was expected; {found:?}, or another blob"));
    }
    if opened.updates().as_ref() != Some(&state.updates) {
        return Err(format!("{:?} updates; {:?} were made", opened.updates(), state.updates));
    }
    // What was verified while opening was found sound, or the open would have ended otherwise.
    let report = match opened.verified_at_open() {
        Some(report) => report.clone(),
        None => opened.verify(&mut |_, _| true).map_err(|e| e.to_string())?,
    };
    let entry = |chunk, group| opened.layout().entry(chunk, group);
    let reported: Vec<_> = report.damaged.iter().map(|d| entry(d.chunk, d.group)).collect();
    if reported != *damaged {
        return Err(format!("{damaged:?} are damaged; verify says {reported:?}"));
    }
    let largest = state.groups.iter().map(|held| held.bytes.len()).max().unwrap_or(0);
    let mut free = None;
    for chunk in 0..opened.layout().chunks().len() {
        for group in Group::ALL {
            let held = &state.groups[entry(chunk, group)];
            let slot = free.take().unwrap_or_else(|| slot_of(largest));
            let is_damaged = damaged.contains(&entry(chunk, group));
            match opened.read_group(&committed.table, chunk, group, slot) {
                Err(Error::Corrupt { .. }) if is_damaged => {}
                Ok(slot) if !is_damaged && slot[..held.bytes.len()] == held.bytes => {
                    free = Some(slot);
                }
                Ok(_) => return Err(format!("wrong bytes in {}", opened.describe(chunk, group))),
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(())
}

fn slot_of(bytes: usize) -> Slot {
    Slot::standalone(bytes, &Ledger::new(), "test").expect("memory")
}

/// What an open must find on a drive, by the rules of `docs/design.md`, section 6.
fn verdict(drive: &Memory, store: &Trained, stranger: &Trained) -> Verdict {
    let page = |at: u64| at..at + PAGE;
    let is_header = |of: &Trained, at| drive.agrees(of.image(), page(at));
    let header =
        HEADER_OFFSETS.into_iter().find(|at| is_header(store, *at) || is_header(stranger, *at));
    if !header.is_some_and(|at| is_header(store, at)) || !manifest_holds(drive, store) {
        return Verdict::Refused;
    }
    let named = |generation: usize| {
        let places = SUPERBLOCK_OFFSETS[generation % 2];
        places.iter().any(|at| drive.agrees(&store.states[generation - 1].image, page(*at)))
    };
    // Of a side only the newest counts: its table and blob took the place of the older one's.
    let newest = [3, 2].into_iter().find(|generation| named(*generation));
    let whole: Vec<usize> =
        [3, 2].into_iter().filter(|g| named(*g) && root_holds(drive, store, *g)).collect();
    let damaged = |generation: usize| -> Vec<usize> {
        let state = &store.states[generation - 1];
        (0..state.groups.len()).filter(|at| !group_holds(drive, state, *at)).collect()
    };
    let Some(&chosen) = whole.first() else { return Verdict::Refused };
    let marker = page(CLEAN_MARKER_OFFSET);
    let vouched_for = drive.agrees(&store.states[chosen - 1].image, marker);
    let opened = |generation, damaged| Verdict::Opened {
        generation,
        fell_back: Some(generation) != newest,
        damaged,
    };
    if Some(chosen) == newest && vouched_for {
        return opened(chosen, damaged(chosen));
    }
    let sound = whole.into_iter().find(|generation| damaged(*generation).is_empty());
    sound.map_or(Verdict::Refused, |generation| opened(generation, Vec::new()))
}

fn manifest_holds(drive: &Memory, store: &Trained) -> bool {
    drive.agrees(store.image(), span(store.header.manifest_offset, store.header.manifest_bytes))
}

/// Whether table and blob of a generation are what was committed.
fn root_holds(drive: &Memory, store: &Trained, generation: usize) -> bool {
    let State { image, blob, .. } = &store.states[generation - 1];
    let side = generation % 2;
    drive.agrees(image, span(store.header.table_offsets[side], store.header.table_bytes))
        && drive.agrees(image, span(store.header.blob_offsets[side], blob.len() as u64))
}

fn group_holds(drive: &Memory, state: &State, at: usize) -> bool {
    drive.agrees(&state.image, state.groups[at].place.clone())
}

fn span(start: u64, bytes: u64) -> Range<u64> {
    start..start + bytes
}

// ------------------------------------------------------------------------------------ the damages

/// The parts of a file; each is hit as often as any other.
const PARTS: [&str; 12] = [
    "header",
    "header copy",
    "superblock",
    "mirror",
    "clean marker",
    "table",
    "blob",
    "manifest",
    "copy A",
    "copy B",
    "single copy",
    "gap",
];

/// The places of a part.
fn places(store: &Trained, part: &str) -> Vec<Range<u64>> {
    let header = &store.header;
    let page = |at: u64| span(at, PAGE);
    let extents = |trained: bool, copy| {
        let layout = &store.layout;
        let of_chunk = move |(index, chunk): (usize, &crate::store::layout::Chunk)| {
            Group::ALL.map(|group| {
                let start = header.data_offset + layout.extent_offset(index, group, copy);
                span(start, chunk.extent_bytes(group) as u64)
            })
        };
        let chunks = layout.chunks().iter().enumerate();
        let chunks = chunks.filter(|(_, chunk)| chunk.format().is_trainable() == trained);
        chunks.flat_map(of_chunk).filter(|extent| !extent.is_empty()).collect()
    };
    match part {
        "header" => vec![page(HEADER_OFFSETS[0])],
        "header copy" => vec![page(HEADER_OFFSETS[1])],
        "superblock" => SUPERBLOCK_OFFSETS.map(|[first, _]| page(first)).to_vec(),
        "mirror" => SUPERBLOCK_OFFSETS.map(|[_, mirror]| page(mirror)).to_vec(),
        "clean marker" => vec![page(CLEAN_MARKER_OFFSET)],
        "table" => header.table_offsets.map(|at| span(at, header.table_bytes)).to_vec(),
        "blob" => [2, 3]
            .map(|g: usize| span(header.blob_offsets[g % 2], store.states[g - 1].blob.len() as u64))
            .to_vec(),
        "manifest" => vec![span(header.manifest_offset, header.manifest_bytes)],
        "copy A" => extents(true, CopyId::A),
        "copy B" => extents(true, CopyId::B),
        "single copy" => extents(false, CopyId::A),
        _ => {
            let mut taken: Vec<_> =
                PARTS[..11].iter().flat_map(|part| places(store, part)).collect();
            taken.sort_by_key(|place| place.start);
            taken.push(span(header.file_bytes, 0));
            let gaps = taken.windows(2).map(|pair| pair[0].end..pair[1].start);
            gaps.filter(|gap| !gap.is_empty()).collect()
        }
    }
}

/// A part, what was done to it, and the drive afterwards, which differs from the one before.
fn damage(
    store: &Trained,
    stranger: &Trained,
    rng: &mut fastrand::Rng,
) -> (&'static str, &'static str, Memory) {
    let part = PARTS[rng.usize(..PARTS.len())];
    let places = places(store, part);
    loop {
        let place = places[rng.usize(..places.len())].clone();
        let at = rng.u64(place.clone());
        let drive = store.image().copy();
        let (what, touched) = match rng.u8(..6) {
            0 => {
                let bit = drive.bytes(span(at, 1))[0] ^ (1 << rng.u8(..8));
                drive.overwrite(at, &[bit]);
                ("a bit", span(at, 1))
            }
            1 => {
                drive.overwrite(at, &[rng.u8(..)]);
                ("a byte", span(at, 1))
            }
            2 => {
                // Not beyond the part: what lies behind it counts as another.
                let sector = span(at / 512 * 512, 512);
                let sector = sector.start.max(place.start)..sector.end.min(place.end);
                let bytes: Vec<u8> = sector.clone().map(|_| rng.u8(..)).collect();
                drive.overwrite(sector.start, &bytes);
                ("a sector", sector)
            }
            3 => {
                let page = span(at / PAGE * PAGE, PAGE);
                let page = page.start.max(place.start)..page.end.min(place.end);
                drive.overwrite(page.start, &vec![0; page.clone().count()]);
                ("zeros", page)
            }
            4 => {
                let other = &places[rng.usize(..places.len())];
                let bytes = (place.end - place.start).min(other.end - other.start).min(4 << 20);
                let (here, there) = (span(place.start, bytes), span(other.start, bytes));
                drive.overwrite(here.start, &store.image().bytes(there.clone()));
                drive.overwrite(there.start, &store.image().bytes(here.clone()));
                ("two swapped", here)
            }
            _ => {
                // Parts of earlier generations, and of a store of the same shape.
                let [first, second, _] = &store.states[..] else { unreachable!("three states") };
                let from = [&first.image, &second.image, stranger.image()][rng.usize(..3)];
                drive.overwrite(place.start, &from.bytes(place.clone()));
                ("an old one put back", place)
            }
        };
        if !drive.agrees(store.image(), touched) {
            return (part, what, drive);
        }
    }
}
