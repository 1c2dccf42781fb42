use super::*;

fn left_here() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    Owner::leave(&path).expect("written");
    (folder, path)
}

#[test]
fn a_hint_names_process_command_and_local_time() {
    let (_folder, path) = left_here();
    let owner = Owner::of(&path);
    assert_eq!(owner.process, Some(std::process::id()));
    assert!(!owner.has_ended, "{owner}");
    let since = jiff::civil::DateTime::strptime("%Y-%m-%d %H:%M:%S", &owner.since);
    let age = since.expect("a date").until(jiff::Zoned::now().datetime()).expect("a span");
    assert!((0..60).contains(&age.get_seconds()) && age.get_hours() == 0, "{age}");
    let text = fs::read_to_string(hint_path(&path)).expect("a hint");
    assert!(text.starts_with(&format!("{owner}\n")), "{text}");
}

#[test]
fn a_process_that_has_ended_is_not_named_as_the_holder() {
    let (_folder, path) = left_here();
    let mut child = std::process::Command::new("true").spawn().expect("started");
    let text = fs::read_to_string(hint_path(&path)).expect("a hint");
    let number = |process: u32| format!("process {process} (");
    let gone = text.replace(&number(std::process::id()), &number(child.id()));
    child.wait().expect("ended");
    fs::write(hint_path(&path), &gone).expect("written");
    let owner = Owner::of(&path);
    assert!(owner.has_ended && owner.to_string().contains("has ended (process"), "{owner}");

    // The same number, given to another process since.
    let start = start_of(std::process::id()).expect("readable").expect("alive");
    fs::write(hint_path(&path), text.replace(&start, "1")).expect("written");
    assert!(Owner::of(&path).has_ended);

    // In another container that number is somebody else: nothing is known.
    let ours = namespace().expect("linux");
    fs::write(hint_path(&path), gone.replace(&ours, "pid:[1]")).expect("written");
    assert!(!Owner::of(&path).has_ended);
}

#[test]
fn whatever_else_lies_there_is_another_process() {
    let (_folder, path) = left_here();
    for text in ["", "process", "process x (y) since z", "process 1 (sh)", "\u{0}\n\n"] {
        fs::write(hint_path(&path), text).expect("written");
        assert_eq!(Owner::of(&path).to_string(), "another process", "{text:?}");
    }
    fs::write(hint_path(&path), "process 1 (a\u{1b}[2J) since now").expect("written");
    assert_eq!(Owner::of(&path).to_string(), "process 1 (a[2J) since now");
    fs::remove_file(hint_path(&path)).expect("removed");
    assert_eq!(Owner::of(&path), Owner::default());
}

#[test]
fn a_pipe_in_the_place_of_a_hint_is_not_waited_for() {
    // Every command that opens the store hung there, for good.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let status = std::process::Command::new("mkfifo").arg(hint_path(&path)).status();
    assert!(status.expect("started").success());
    assert_eq!(Owner::of(&path), Owner::default());
    Owner::leave(&path).expect_err("nobody reads it");
}
