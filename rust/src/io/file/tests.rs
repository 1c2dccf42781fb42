use super::*;

fn made() -> (tempfile::TempDir, DirectFile) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = DirectFile::create(&folder.path().join("store"), 8192).expect("a file");
    (folder, file)
}

#[test]
fn whoever_waits_is_told_by_whom_and_gets_the_file_when_it_comes_free() {
    let (_folder, file) = made();
    let path = file.path().to_owned();
    let (mut held, mut turns) = (Some(file), 0);
    let opened = DirectFile::open_waiting(&path, &mut |owner, _| {
        assert_eq!(owner.process, Some(std::process::id()));
        turns += 1;
        if turns == 3 {
            held = None;
        }
        Ok(())
    });
    drop(opened.expect("opened"));
    assert_eq!(turns, 3);
    assert!(!owner::hint_path(&path).exists(), "a hint was left behind");
}

#[test]
fn waiting_ends_when_the_caller_says_so_and_changes_nothing() {
    let (_folder, file) = made();
    let stop = |_: &Owner, _| Err(Error::invalid("stop"));
    let refused = DirectFile::open_waiting(file.path(), &mut { stop });
    assert_eq!(refused.expect_err("stopped").to_string(), "stop");
    assert!(owner::hint_path(file.path()).exists(), "the holder's hint is gone");
}

#[test]
fn the_error_names_the_holder_and_the_time() {
    let (_folder, file) = made();
    let text = DirectFile::open(file.path()).expect_err("in use").to_string();
    let owner = Owner::of(file.path());
    assert!(text.contains(&format!("in use by {owner} (waited 5.")), "{text}");
}

#[test]
fn asking_who_holds_a_file_takes_nothing() {
    let (_folder, file) = made();
    let path = file.path().to_owned();
    let found = DirectFile::owner_of(&path).expect("asked").expect("held");
    assert_eq!(found.process, Some(std::process::id()));
    drop(file);
    let looking = DirectFile::open_unlocked(&path).expect("opened");
    assert_eq!(DirectFile::owner_of(&path).expect("asked"), None);
    drop(DirectFile::open(&path).expect("free"));
    drop(looking);
}

/// A training that waited for a store got the lock of the file that `clean` had removed, and
/// trained into a file without a name. Now it is told.
#[test]
fn a_file_that_is_removed_while_it_is_waited_for_is_refused() {
    let (_folder, file) = made();
    let path = file.path().to_owned();
    let mut held = Some(file);
    let opened =
        DirectFile::open_waiting(&path, &mut |_, _| held.take().map_or(Ok(()), DirectFile::remove));
    let text = opened.expect_err("removed").to_string();
    assert!(text.contains("removed while it was waited for"), "{text}");
    assert!(!path.exists() && !owner::hint_path(&path).exists());
}

#[test]
fn only_the_file_that_is_locked_is_removed() {
    let (folder, file) = made();
    let path = file.path().to_owned();
    fs::rename(&path, folder.path().join("elsewhere")).expect("renamed");
    fs::write(&path, "another").expect("written");
    assert!(file.remove().is_err());
    assert_eq!(fs::read(&path).expect("read"), b"another");
    DirectFile::open_unlocked(&path).expect("opened").remove().expect_err("not locked");
}
