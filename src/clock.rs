//! The wall clock that messages are stamped with.

/// Milliseconds since 1970, as of the kernel's last tick.
///
/// # Cost
/// A few nanoseconds and never a system call on Linux, at the price of being up to one tick (1 to 10 ms) behind.
/// Good for time stamps and expiry; measure elapsed time with [`Instant`](std::time::Instant).
#[must_use]
pub fn now_unix_ms() -> u64 {
    coarse_unix_ms().unwrap_or_else(precise_unix_ms)
}

/// Milliseconds since 1970 by the precise clock, rounded up. What is due so long after this and awaited by [`now_unix_ms`]
/// is never early.
#[must_use]
pub fn ceil_unix_ms() -> u64 {
    precise_unix_ms() + 1
}

#[cfg(target_os = "linux")]
fn coarse_unix_ms() -> Option<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // By way of the C library, as everything else: a look for the vDSO of one's own does not survive valgrind.
    // SAFETY: `now` is a valid place for the answer.
    if unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut now) } != 0 {
        return None;
    }
    let seconds = u64::try_from(now.tv_sec).ok()?;
    let nanos = u64::try_from(now.tv_nsec).ok()?;
    Some(seconds * 1_000 + nanos / 1_000_000)
}

#[cfg(not(target_os = "linux"))]
fn coarse_unix_ms() -> Option<u64> {
    None
}

/// A clock before 1970 is taken for 1970.
fn precise_unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheap_clock_keeps_up_with_the_precise_one() {
        let before = precise_unix_ms();
        let now = now_unix_ms();
        let after = precise_unix_ms();
        assert!(now + 100 >= before && now <= after, "{before} {now} {after}");
        assert!(ceil_unix_ms() > after);
    }
}
