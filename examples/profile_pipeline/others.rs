//! Whether the machine was quiet: cores that something else kept busy while this was measured.

use std::time::Instant;

/// Ticks a second of the times that Linux tells, on all that it runs on.
const TICKS: f64 = 100.0;

/// A moment from which on others are watched.
pub struct Others {
    began: Instant,
    /// Seconds of all cores that were busy by then with anything but this process and its children.
    busy: Option<f64>,
}

impl Others {
    /// From now on.
    pub fn from_now() -> Others {
        Others { began: Instant::now(), busy: busy_with_others() }
    }

    /// Cores busy with others on average since then, those that the host gave to other machines among them. Only Linux
    /// tells.
    pub fn cores(&self) -> Option<f64> {
        let busy = busy_with_others()? - self.busy?;
        Some(busy.max(0.0) / self.began.elapsed().as_secs_f64().max(1e-3))
    }
}

fn busy_with_others() -> Option<f64> {
    let all = busy_ticks(&std::fs::read_to_string("/proc/stat").ok()?)?;
    let own = own_ticks(&std::fs::read_to_string("/proc/self/stat").ok()?)?;
    Some((all - own) / TICKS)
}

/// Of all cores: user, nice, system, irq, softirq and steal, without idle and waiting for a disk.
fn busy_ticks(stat: &str) -> Option<f64> {
    let cpu = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = cpu.split_whitespace().map(|ticks| ticks.parse().ok()).collect::<Option<_>>()?;
    Some([0, 1, 2, 5, 6, 7].iter().filter_map(|&index| ticks.get(index)).sum())
}

/// Of this process and the children that have ended: utime, stime, cutime and cstime, counted behind the name, which may
/// have blanks and brackets in it.
fn own_ticks(stat: &str) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    fields.get(11..15)?.iter().map(|ticks| ticks.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_is_read_from_what_linux_tells() {
        assert_eq!(busy_ticks("cpu  10 1 5 900 70 2 3 4 0 0\ncpu0 1 1\n"), Some(25.0));
        let stat = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 15 16";
        assert_eq!(own_ticks(stat), Some(127.0));
        assert_eq!((busy_ticks("nothing"), own_ticks("nothing")), (None, None));
    }
}
