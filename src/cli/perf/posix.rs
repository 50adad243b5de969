//! The few system calls that the standard library does not offer, each behind a safe function.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Nanoseconds of `CLOCK_MONOTONIC`, the same for every process of the machine.
pub(super) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing; the clock always exists on the systems we build for.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs() * NANOS_PER_SECOND + now.tv_nsec.unsigned_abs()
}

/// Waits until `socket` can be read (or is closed), for at most `timeout`; says whether it can.
///
/// An interrupting signal counts as "not yet".
pub(super) fn wait_readable(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: one valid entry, a valid timeout, no signal mask.
    let ready = unsafe { libc::ppoll(&mut entry, 1, &timeout, std::ptr::null()) };
    if ready >= 0 {
        return Ok(ready > 0);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        error => Err(error),
    }
}

/// Many sockets, of which those with input are wanted.
#[derive(Debug)]
pub(super) struct InputPoll {
    epoll: OwnedFd,
    ready: Vec<libc::epoll_event>,
}

impl InputPoll {
    /// Sockets told of at once.
    const MOST_READY: usize = 256;

    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let raw = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made, and that nobody else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { epoll, ready: vec![libc::epoll_event { events: 0, u64: 0 }; Self::MOST_READY] })
    }

    /// Adds a socket, which [`Self::wait`] will call `token`.
    pub(super) fn add(&self, socket: BorrowedFd<'_>, token: usize) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, token)
    }

    pub(super) fn remove(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, socket, 0)
    }

    fn control(&self, operation: libc::c_int, socket: BorrowedFd<'_>, token: usize) -> io::Result<()> {
        let events = libc::EPOLLIN.cast_unsigned();
        let mut event = libc::epoll_event { events, u64: token as u64 };
        // SAFETY: two open descriptors and a valid event.
        let done = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, socket.as_raw_fd(), &mut event) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until a socket has input (or is closed), for at most `timeout`, to the microsecond; tells which have.
    pub(super) fn wait(&mut self, timeout: Duration) -> io::Result<impl Iterator<Item = usize> + use<'_>> {
        let mut count = 0;
        if timeout.is_zero() || wait_readable(self.epoll.as_fd(), timeout)? {
            let (events, room) = (self.ready.as_mut_ptr(), libc::c_int::try_from(self.ready.len()).unwrap_or(1));
            // SAFETY: `room` events may be written there; without a timeout it does not block.
            let ready = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events, room, 0) };
            count = match usize::try_from(ready) {
                Ok(ready) => ready,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => 0,
                    error => return Err(error),
                },
            };
        }
        Ok(self.ready[..count].iter().map(|event| usize::try_from(event.u64).unwrap_or(usize::MAX)))
    }
}

/// Lets timers of the calling thread fire on time instead of up to 50 µs late.
pub(super) fn use_precise_timers() {
    // SAFETY: plain integers; a refusal only leaves the default slack.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
}

/// Lets this process have `wanted` files open, as far as its hard limit goes; returns how many it may.
pub(super) fn allow_open_files(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let (current, most) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let raised = wanted.min(most);
    if raised <= current {
        return current;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit }) {
        Ok(()) => raised,
        Err(_) => current,
    }
}

/// CPU time that this process has used so far, user and system together.
pub(super) fn own_cpu() -> Duration {
    // SAFETY: an all-zero `rusage` is a valid value, and it is valid for writing.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    [usage.ru_utime, usage.ru_stime]
        .map(|time| Duration::new(time.tv_sec.unsigned_abs(), 0) + Duration::from_micros(time.tv_usec.unsigned_abs()))
        .iter()
        .sum()
}

/// Clock ticks per second, the unit of `/proc/PID/stat`.
pub(super) fn clock_ticks_per_second() -> u64 {
    // SAFETY: no pointers.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1)
}

/// Turns the first Ctrl-C into [`was_interrupted`]; the second one ends the process as usual.
pub(super) fn catch_interrupt() {
    extern "C" fn on_interrupt(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
        // SAFETY: `signal` may be called from a handler.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
    }
    let handler: extern "C" fn(libc::c_int) = on_interrupt;
    // SAFETY: the handler only stores to an atomic and resets the signal.
    unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
}

/// Whether Ctrl-C was pressed since [`catch_interrupt`].
pub(super) fn was_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
