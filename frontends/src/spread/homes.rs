//! Which executor a volume lives on: the one that claimed it first. Looked at when a client attaches, never on the path
//! of a request.
//!
//! A volume that was attached keeps its home for as long as the process lives: its executor holds it for a while after
//! its last user has gone, and a second writer elsewhere in this process would fence it. A name that could not be
//! attached is forgotten with its last claim, so that clients who ask for what is not there cost no memory.

use std::sync::{Arc, Mutex, MutexGuard};
use torus_schema::hash::Map;

#[derive(Default)]
pub struct Homes {
    homes: Mutex<Map<String, Home>>,
}

struct Home {
    executor: usize,
    claims: usize,
    /// It was attached.
    settled: bool,
}

/// Somebody is about to attach a volume at its home.
pub struct Claim {
    homes: Arc<Homes>,
    pub name: String,
    pub executor: usize,
}

impl Homes {
    fn lock(&self) -> MutexGuard<'_, Map<String, Home>> {
        self.homes.lock().expect("nobody panics while holding it")
    }

    /// At `executor`, if it has no home yet.
    pub fn claim(self: &Arc<Self>, name: &str, executor: usize) -> Claim {
        let mut homes = self.lock();
        let home = homes.entry(name.to_string()).or_insert(Home { executor, claims: 0, settled: false });
        home.claims += 1;
        Claim { homes: self.clone(), name: name.to_string(), executor: home.executor }
    }

    pub fn home(&self, name: &str) -> Option<usize> {
        self.lock().get(name).map(|home| home.executor)
    }
}

impl Claim {
    /// It is attached.
    pub fn settle(&self) {
        self.homes.lock().get_mut(&self.name).expect("a claim keeps it").settled = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut homes = self.homes.lock();
        let home = homes.get_mut(&self.name).expect("a claim keeps it");
        home.claims -= 1;
        if home.claims == 0 && !home.settled {
            homes.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_claims_first_is_its_home_and_stays_it_once_it_was_attached() {
        let homes = Arc::<Homes>::default();
        let (first, second) = (homes.claim("db", 1), homes.claim("db", 0));
        assert_eq!((first.executor, second.executor), (1, 1));
        first.settle();
        drop((first, second));
        assert_eq!(homes.claim("db", 0).executor, 1);
        assert_eq!(homes.home("db"), Some(1));
    }

    #[test]
    fn a_name_that_cannot_be_attached_is_forgotten_with_its_last_claim() {
        let homes = Arc::<Homes>::default();
        let (first, second) = (homes.claim("nowhere", 1), homes.claim("nowhere", 0));
        drop(first);
        assert_eq!(homes.home("nowhere"), Some(1), "somebody may be attaching it there");
        drop(second);
        assert_eq!(homes.home("nowhere"), None);
    }
}
