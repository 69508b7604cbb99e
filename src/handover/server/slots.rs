//! How many requests may wait for FUSE at once, in all and of one user.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) struct Slots {
    limit: usize,
    limit_of_one: usize,
    taken: Mutex<HashMap<u32, usize>>,
}

/// A place among those that wait; free again when dropped.
pub(super) struct Slot<'a> {
    slots: &'a Slots,
    uid: u32,
}

impl Slots {
    pub(super) fn new(limit: usize, limit_of_one: usize) -> Self {
        Self {
            limit,
            limit_of_one,
            taken: Mutex::default(),
        }
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a user, unless he, or all, have as many as may be.
    pub(super) fn take(&self, uid: u32) -> Option<Slot<'_>> {
        let mut taken = self.taken();
        let all: usize = taken.values().sum();
        let of_one = taken.entry(uid).or_default();
        if all >= self.limit || *of_one >= self.limit_of_one {
            return None;
        }
        *of_one += 1;
        Some(Slot { slots: self, uid })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut taken = self.slots.taken();
        if let Some(of_one) = taken.get_mut(&self.uid) {
            *of_one -= 1;
            if *of_one == 0 {
                taken.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_leaves_room_for_others() {
        let slots = Slots::new(3, 2);
        let first = (slots.take(1).unwrap(), slots.take(1).unwrap());
        assert!(slots.take(1).is_none());
        let other = slots.take(2).unwrap();
        assert!(slots.take(3).is_none());
        drop(first.0);
        assert!(slots.take(3).is_some());
        drop((first.1, other));
        assert!(slots.taken().values().sum::<usize>() == 0);
    }
}
