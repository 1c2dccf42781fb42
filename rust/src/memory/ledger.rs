//! The memory ledger: every byte that the package allocates stands under a named account.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one account, now and at the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// Bytes held now.
    pub current: u64,
    /// Most bytes held at once.
    pub peak: u64,
}

#[derive(Debug, Default)]
struct Accounts {
    balances: BTreeMap<String, Balance>,
    total: Balance,
}

/// Accounts by name. Cheap to clone; clones share the accounts.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    accounts: Arc<Mutex<Accounts>>,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters `bytes` under `account` until the returned entry is dropped.
    #[must_use]
    pub fn enter(&self, account: &str, bytes: u64) -> Entry {
        self.change(account, |balance| balance.current += bytes);
        Entry { ledger: self.clone(), account: account.to_owned(), bytes }
    }

    /// Sets the bytes that `account` holds now.
    pub fn set(&self, account: &str, bytes: u64) {
        self.change(account, |balance| balance.current = bytes);
    }

    /// Every account with its balance, by name.
    #[must_use]
    pub fn balances(&self) -> BTreeMap<String, Balance> {
        self.lock().balances.clone()
    }

    /// All accounts together; the peak is that of the sum, not the sum of the peaks.
    #[must_use]
    pub fn total(&self) -> Balance {
        self.lock().total
    }

    fn change(&self, account: &str, edit: impl FnOnce(&mut Balance)) {
        let mut accounts = self.lock();
        let balance = accounts.balances.entry(account.to_owned()).or_default();
        let before = balance.current;
        edit(balance);
        balance.peak = balance.peak.max(balance.current);
        let after = balance.current;
        accounts.total.current = accounts.total.current - before + after;
        accounts.total.peak = accounts.total.peak.max(accounts.total.current);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Accounts> {
        // The accounts are plain numbers: a panic elsewhere leaves them whole.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes held under an account; dropping it gives them back.
#[derive(Debug)]
pub struct Entry {
    ledger: Ledger,
    account: String,
    bytes: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ledger.change(&self.account, |balance| {
            balance.current = balance.current.saturating_sub(self.bytes);
        });
    }
}

#[cfg(test)]
mod tests;
