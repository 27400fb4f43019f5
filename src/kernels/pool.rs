//! The threads that a CPU stage computes on. A decoder layer is a handful of passes of a few microseconds each, so the
//! threads spin between passes and park only when a stage has been idle for a while.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work spins before it parks: longer than the scheduler takes between two steps of decode, so
/// that a running sequence never waits for a wake-up.
const SPIN: Duration = Duration::from_micros(200);

/// Spins between two looks at the clock.
const SPINS: u32 = 64;

/// Threads that run one piece of work at a time, together with the thread that asks for it.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Stages that share a pool take turns.
    turn: Mutex<()>,
}

/// A pass: called once on each thread with the thread's index.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// Number of the pass. A worker that sees a new one runs `work`.
    pass: AtomicUsize,
    /// The pass's work, valid while `running` is above zero.
    work: UnsafeCell<Option<*const Work<'static>>>,
    /// Workers that have not finished the pass.
    running: AtomicUsize,
    /// Workers that are parked or about to be.
    parked: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `work` is written by the thread that holds `turn` while no worker is in a pass, and read by workers after they
// have seen `pass` change, which is stored afterwards with release order.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is to something `Sync`, see above.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `threads - 1` threads; the one that calls [`run`](Self::run) is the last.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            pass: AtomicUsize::new(0),
            work: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        // Dropped on an early return, which stops those that were started.
        let mut pool = Pool { shared: shared.clone(), workers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = shared.clone();
            let name = format!("pipeline-cpu-{index}");
            pool.workers.push(std::thread::Builder::new().name(name).spawn(move || shared.work(index))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work` once on each thread, with the thread's index, and returns when all are done. A panic in one is passed
    /// on when all are done. `work` must not call `run` of the same pool.
    pub fn run(&self, work: &Work) {
        if self.workers.is_empty() {
            return work(0);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: no worker reads `work` between passes, and this thread has the turn. The lifetime is gone from the
        // pointer's type, but the pass ends before this function returns, on a panic too.
        unsafe { *shared.work.get() = Some(std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work)) };
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        // Sequentially consistent with `parked`: either this thread sees that a worker parks, or the worker the new pass.
        shared.pass.fetch_add(1, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let mut rounds = 0u32;
        while shared.running.load(Ordering::Acquire) > 0 {
            relax(&mut rounds);
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(theirs) {
            drop(_turn);
            resume_unwind(panic);
        }
    }

    /// Runs `work` for each of `0..tasks`, shared out over the threads in the order of the tasks.
    pub fn for_each(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            return (0..tasks).for_each(work);
        }
        let next = AtomicUsize::new(0);
        self.run(&|_| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task);
            }
        });
    }
}

/// Waits a little: on the core at first, then letting others have it, since there may be more threads than cores.
fn relax(rounds: &mut u32) {
    *rounds += 1;
    if *rounds < 1 << 12 {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.wait_for_pass(seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // One pass cannot follow another before this worker has finished it.
            seen = self.pass.load(Ordering::Acquire);
            // SAFETY: the pass has begun, so `work` was written before and is valid until `running` is counted down.
            let work = unsafe { &*(*self.work.get()).expect("a pass has work") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(index))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }

    fn wait_for_pass(&self, seen: usize) {
        let idle_since = Instant::now();
        loop {
            for _ in 0..SPINS {
                if self.pass.load(Ordering::Acquire) != seen {
                    return;
                }
                std::hint::spin_loop();
            }
            if idle_since.elapsed() > SPIN {
                break;
            }
        }
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked.fetch_add(1, Ordering::SeqCst);
        while self.pass.load(Ordering::SeqCst) == seen {
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.pass.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // It cannot have panicked: what it runs is caught.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_every_pass_and_every_task_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for pass in 0..200 {
                let ran: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|index| {
                    ran[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 1));
                let tasks: Vec<AtomicUsize> = (0..pass).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(pass, |task| {
                    tasks[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(tasks.iter().all(|task| task.load(Ordering::Relaxed) == 1));
                if pass % 50 == 0 {
                    std::thread::sleep(SPIN * 3); // let them park
                }
            }
        }
    }

    #[test]
    fn a_panic_is_passed_on_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        for thread in 0..3 {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|index| assert_ne!(index, thread, "thread {thread}"));
            }));
            assert!(panicked.is_err());
            let ran = AtomicUsize::new(0);
            pool.run(&|_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 3);
        }
    }

    #[test]
    fn stages_take_turns_on_a_shared_pool() {
        let pool = Pool::new(2).unwrap();
        let busy = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(&|_| {
                            assert!(busy.fetch_add(1, Ordering::SeqCst) < 2);
                            busy.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
    }
}
