//! The threads that a CPU stage computes on. A decoder layer is a handful of passes of a few microseconds each, so the
//! threads spin between passes and park only when a stage has been idle for a while.
//!
//! The system may give a thread's core to another process for some milliseconds, a hundred times as long as a pass takes.
//! A pass therefore ends when all of its tasks are done, whether or not every thread has taken part: a thread that comes
//! late finds the pass closed. Nothing can take over a task that has begun; when such a task holds up a pass, the calling
//! thread computes alone for a while, and the others park, which leaves the other process a core.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work spins before it parks: longer than the scheduler takes between two steps of decode, so
/// that a running sequence never waits for a wake-up.
const SPIN: Duration = Duration::from_micros(200);

/// Spins between two looks at the clock.
const SPINS: u32 = 64;

/// A pass is held up when its last task takes this much longer than the calling thread has worked on it.
const STALL: Duration = Duration::from_micros(100);

/// How long the calling thread sleeps at a time once a pass is held up. Its core is then free for the thread that it
/// waits for.
const NAP: Duration = Duration::from_micros(20);

/// How long the calling thread computes alone after a pass was held up: at first, and at most.
const ALONE: [Duration; 2] = [Duration::from_millis(4), Duration::from_millis(128)];

/// A pass that is held up this soon after the other threads were asked again is held up by the same cause: some times as
/// long as a system lets a thread have its core before another has it.
const AGAIN: Duration = Duration::from_millis(30);

/// Threads that run one piece of work at a time, together with the thread that asks for it.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Stages that share a pool take turns.
    turn: Mutex<Stalls>,
    /// Times that a caller has slept for a pass.
    #[cfg(test)]
    naps: AtomicUsize,
}

/// A pass: called once on each thread that takes part, with the thread's index.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// The latest pass, see [`State`].
    state: AtomicU64,
    /// The pass's work, valid while the pass is open or a worker is inside.
    work: UnsafeCell<Option<*const Work<'static>>>,
    /// Whether a worker is parked or about to be.
    parked: AtomicBool,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    lock: Mutex<()>,
    wake: Condvar,
    /// Workers stop in front of the next pass.
    #[cfg(test)]
    held: AtomicBool,
}

/// A pass in a word: its number, whether workers may enter, how many have, and how many are inside.
#[derive(Clone, Copy)]
struct State(u64);

impl State {
    const OPEN: u64 = 1 << 31;
    const ENTERED: u64 = 1 << 16;
    const INSIDE: u64 = 1;
    /// Most workers that the counts have room for.
    const MOST: usize = (1 << 15) - 1;

    fn number(self) -> u32 {
        (self.0 >> 32) as u32
    }

    fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    fn entered(self) -> usize {
        (self.0 / Self::ENTERED) as usize & Self::MOST
    }

    fn inside(self) -> usize {
        self.0 as usize & (Self::ENTERED as usize - 1)
    }

    /// The next pass, open.
    fn next(self) -> State {
        State(u64::from(self.number().wrapping_add(1)) << 32 | Self::OPEN)
    }
}

// SAFETY: `work` is written by the thread that holds `turn` while the pass is closed and no worker is inside, and read by
// workers that are inside: they have entered an open pass by a compare-exchange with acquire order, after the store with
// release order that opened it.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is to something `Sync`, see above.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `threads - 1` threads; the one that calls [`run`](Self::run) is the last.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        if threads > State::MOST {
            let most = format!("a pool of {threads} threads, of at most {}", State::MOST);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, most));
        }
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            parked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            #[cfg(test)]
            held: AtomicBool::new(false),
        });
        // Dropped on an early return, which stops those that were started.
        let mut pool = Pool {
            shared: shared.clone(),
            workers: Vec::new(),
            turn: Mutex::default(),
            #[cfg(test)]
            naps: AtomicUsize::new(0),
        };
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
    /// on when all are done. `work` must not call `run` or `for_each` of the same pool.
    pub fn run(&self, work: &Work) {
        if self.workers.is_empty() {
            return work(0);
        }
        let turn = self.turn();
        self.pass(turn, work, |_, pass| {
            let mut rounds = 0u32;
            while pass.state().entered() < self.workers.len() {
                relax(&mut rounds);
            }
            pass.close();
            while pass.state().inside() > 0 {
                relax(&mut rounds);
            }
        });
    }

    /// Runs `work` for each of `0..tasks`. The threads take tasks in their order; those that come late take none. A panic
    /// in one is passed on when the others are done. `work` must not call `run` or `for_each` of the same pool.
    pub fn for_each(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            return (0..tasks).for_each(work);
        }
        let (turn, began) = (self.turn(), Instant::now());
        if turn.is_alone(began) {
            return (0..tasks).for_each(work);
        }
        let next = AtomicUsize::new(0);
        let take = |_| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task);
            }
        };
        self.pass(turn, &take, |turn, pass| {
            // All tasks have been taken, or one has panicked.
            pass.close();
            let mut waiting = None;
            let mut spins = 0u32;
            while pass.state().inside() > 0 {
                std::hint::spin_loop();
                spins += 1;
                if !spins.is_multiple_of(SPINS) {
                    continue;
                }
                let now = Instant::now();
                let (since, limit) = *waiting.get_or_insert((now, now.duration_since(began) + STALL));
                if now.duration_since(since) > limit {
                    turn.note(now);
                    while pass.state().inside() > 0 {
                        #[cfg(test)]
                        self.naps.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(NAP);
                    }
                    turn.resume(Instant::now());
                }
            }
        });
    }

    fn turn(&self) -> MutexGuard<'_, Stalls> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a pass, takes part in it, and calls `end`, which closes it and returns when no worker is inside.
    fn pass(&self, mut turn: MutexGuard<Stalls>, work: &Work, end: impl FnOnce(&mut Stalls, &Shared)) {
        let shared = &*self.shared;
        // SAFETY: the pass before this one is closed and nobody is inside, and this thread has the turn. The lifetime is
        // gone from the pointer's type, but the pass ends before this function returns, on a panic too.
        unsafe { *shared.work.get() = Some(std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work)) };
        shared.announce(shared.state().next());
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        end(&mut turn, shared);
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(theirs) {
            drop(turn);
            resume_unwind(panic);
        }
    }
}

/// When passes were held up, and until when the calling thread computes alone. A thread that is held up once is tried
/// again soon; one that is held up again and again, less and less often.
#[derive(Default)]
struct Stalls {
    until: Option<Instant>,
    alone: Duration,
}

impl Stalls {
    fn is_alone(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// A pass is held up.
    fn note(&mut self, now: Instant) {
        let [shortest, longest] = ALONE;
        // Since the other threads were last asked to take part again.
        let again = self.until.is_some_and(|until| now.saturating_duration_since(until) < self.alone + AGAIN);
        self.alone = if again { (4 * self.alone).min(longest) } else { shortest };
    }

    /// The pass that was held up is over.
    fn resume(&mut self, now: Instant) {
        self.until = Some(now + self.alone);
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
    fn state(&self) -> State {
        State(self.state.load(Ordering::Acquire))
    }

    /// Lets workers see a pass. Sequentially consistent with `parked`: either this thread sees that a worker parks, or the
    /// worker the new pass.
    fn announce(&self, pass: State) {
        self.state.store(pass.0, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.parked.store(false, Ordering::SeqCst);
            self.wake.notify_all();
        }
    }

    /// No worker enters the pass any more.
    fn close(&self) {
        self.state.fetch_and(!State::OPEN, Ordering::AcqRel);
    }

    /// Enters the latest pass if it is open. Returns its number, and whether this thread is inside.
    fn enter(&self) -> (u32, bool) {
        let enter = |state| {
            let state = State(state);
            state.is_open().then_some(state.0 + State::ENTERED + State::INSIDE)
        };
        match self.state.fetch_update(Ordering::Acquire, Ordering::Acquire, enter) {
            Ok(state) => (State(state).number(), true),
            Err(state) => (State(state).number(), false),
        }
    }

    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.wait_for_pass(seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            #[cfg(test)]
            while self.held.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let inside;
            (seen, inside) = self.enter();
            if !inside {
                continue;
            }
            // SAFETY: this thread is inside the pass, so `work` was written before and stays valid until it leaves.
            let work = unsafe { &*(*self.work.get()).expect("a pass has work") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(index))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
            self.state.fetch_sub(State::INSIDE, Ordering::Release);
        }
    }

    fn wait_for_pass(&self, seen: u32) {
        let idle_since = Instant::now();
        loop {
            for _ in 0..SPINS {
                if self.state().number() != seen {
                    return;
                }
                std::hint::spin_loop();
            }
            if idle_since.elapsed() > SPIN {
                break;
            }
        }
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            self.parked.store(true, Ordering::SeqCst);
            if State(self.state.load(Ordering::SeqCst)).number() != seen {
                return;
            }
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Closed: there is nothing to do in it.
        self.shared.announce(State(self.shared.state().next().0 & !State::OPEN));
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

    #[test]
    fn a_thread_that_is_held_before_a_pass_does_not_hold_it_up() {
        let pool = Pool::new(3).unwrap();
        let caller = std::thread::current().id();
        pool.shared.held.store(true, Ordering::SeqCst);
        // More passes than a thread could hold up, each with a closure of its own that is gone afterwards.
        for pass in 2..500 {
            let ran: Vec<AtomicUsize> = (0..pass).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(pass, |task| {
                assert_eq!(std::thread::current().id(), caller);
                ran[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 1));
        }
        pool.shared.held.store(false, Ordering::SeqCst);
        // Once it is let go it takes part again: a task waits for tasks on both other threads.
        let threads = Mutex::new(std::collections::HashSet::new());
        pool.for_each(1000, |_| {
            threads.lock().unwrap().insert(std::thread::current().id());
            while threads.lock().unwrap().len() < 3 {
                std::thread::yield_now();
            }
        });
        assert_eq!(threads.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_task_that_has_begun_is_waited_for_and_then_the_caller_computes_alone() {
        let pool = Pool::new(2).unwrap();
        let caller = std::thread::current().id();
        let (theirs, done) = (AtomicBool::new(false), AtomicBool::new(false));
        pool.for_each(2, |_| {
            if std::thread::current().id() == caller {
                while !theirs.load(Ordering::SeqCst) {
                    std::thread::yield_now(); // until the other thread has a task
                }
            } else {
                theirs.store(true, Ordering::SeqCst);
                // Held up until the caller has noted it, whenever that is.
                while pool.naps.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                done.store(true, Ordering::SeqCst);
            }
        });
        assert!(done.load(Ordering::SeqCst));
        let until = pool.turn().until.expect("the pass was held up");
        // As long as that the other threads are not asked.
        pool.turn().until = Some(until + Duration::from_secs(3600));
        pool.for_each(100, |_| assert_eq!(std::thread::current().id(), caller));
    }

    #[test]
    fn a_thread_that_is_held_up_again_is_asked_less_and_less_often() {
        let [shortest, longest] = ALONE;
        let mut stalls = Stalls::default();
        let mut now = Instant::now();
        assert!(!stalls.is_alone(now));
        let mut expected = shortest;
        for _ in 0..10 {
            stalls.note(now);
            stalls.resume(now + Duration::from_millis(3));
            now += Duration::from_millis(3);
            assert_eq!(stalls.alone, expected);
            assert!(stalls.is_alone(now + expected - Duration::from_nanos(1)) && !stalls.is_alone(now + expected));
            now += expected + AGAIN / 2;
            expected = longest.min(4 * expected);
        }
        assert_eq!(stalls.alone, longest);
        // After a time without stalls it counts as the first.
        stalls.note(now + longest + AGAIN);
        assert_eq!(stalls.alone, shortest);
    }
}
