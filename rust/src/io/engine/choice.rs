//! Choosing an engine: io_uring where a ring can be set up, else threads.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::engine::Engine;
use crate::io::engine::threads::Threads;
#[cfg(all(feature = "uring", target_os = "linux"))]
use crate::io::engine::uring::Uring;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// `uring` where a ring can be set up, else `threads`.
    #[default]
    Auto,
    /// `uring` or an error.
    Uring,
    /// `threads`.
    Threads,
}

/// Starts the chosen engine for so many drives; the second value is why `auto` did not take `uring`.
///
/// # Errors
/// `Unsupported` when `uring` was demanded and cannot be had; `Io` when threads cannot be started.
pub fn start(choice: Choice, drives: usize) -> Result<(Arc<dyn Engine>, Option<String>)> {
    if choice == Choice::Threads {
        return Ok((Arc::new(Threads::start(drives)?), None));
    }
    #[cfg(all(feature = "uring", target_os = "linux"))]
    let refused = match Uring::start(drives) {
        Ok(engine) => return Ok((Arc::new(engine), None)),
        Err(error) => error.to_string(),
    };
    #[cfg(not(all(feature = "uring", target_os = "linux")))]
    let refused = "this build has no io_uring".to_owned();
    if choice == Choice::Uring {
        return Err(Error::Unsupported { feature: "io engine uring".into(), reason: refused });
    }
    Ok((Arc::new(Threads::start(drives)?), Some(refused)))
}
