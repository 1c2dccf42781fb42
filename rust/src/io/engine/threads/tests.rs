use super::*;

#[test]
fn keeps_the_rules_of_an_engine() {
    crate::io::engine::tests::conformance::run(&Threads::start(1).expect("threads"));
}
