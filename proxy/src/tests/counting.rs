//! The allocator of this test program: the system's, with a count of what threads that are under test ask for.
//!
//! An allocator can only be replaced through an unsafe trait, and only once for a program. It is here and not in a test
//! program of its own because only tests inside of the crate can be a packet filter for a pair of proxies. For all other
//! tests it is one thread-local load for each allocation.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static ARMED: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
/// Where the first ones came from: what a failed test is understood by.
static PLACES: Mutex<Vec<Backtrace>> = Mutex::new(Vec::new());
const MOST_PLACES: u64 = 3;

thread_local! {
    // Without a destructor, so that it can be read at any moment of a thread's life.
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

/// What this thread allocates does not count: it plays an application.
pub(crate) fn exempt() {
    EXEMPT.set(true);
}

/// What was allocated by threads that are not exempt while `work` ran: how often, and where first. One at a time in a
/// process.
pub(crate) fn allocations(work: impl FnOnce()) -> (u64, Vec<Backtrace>) {
    exempt();
    COUNT.store(0, Ordering::SeqCst);
    ARMED.store(true, Ordering::SeqCst);
    work();
    ARMED.store(false, Ordering::SeqCst);
    let places = std::mem::take(&mut *PLACES.lock().unwrap_or_else(PoisonError::into_inner));
    (COUNT.load(Ordering::SeqCst), places)
}

struct Counting;

impl Counting {
    fn note() {
        if !ARMED.load(Ordering::Relaxed) || EXEMPT.get() {
            return;
        }
        if COUNT.fetch_add(1, Ordering::Relaxed) < MOST_PLACES {
            // Noting the place allocates.
            EXEMPT.set(true);
            let place = Backtrace::force_capture();
            PLACES.lock().unwrap_or_else(PoisonError::into_inner).push(place);
            EXEMPT.set(false);
        }
    }
}

// SAFETY: every call goes to the system's allocator with the same arguments, whose contract is this trait's own; counting
// touches no memory of the caller's, and does not enter itself (`EXEMPT`).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}
