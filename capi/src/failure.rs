//! What a call that fails leaves behind: errno, and a message for its thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bypass::Refusal;
use nix::errno::Errno;

/// Why a call failed.
pub(crate) struct Failure {
    errno: Errno,
    message: String,
}

impl Failure {
    pub(crate) fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self {
            errno,
            message: message.into(),
        }
    }

    /// An argument that cannot be meant.
    pub(crate) fn invalid(message: &str) -> Self {
        Self::new(Errno::EINVAL, message)
    }

    fn of_panic(payload: Box<dyn Any + Send>) -> Self {
        let text = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        let failure = Self::new(Errno::EIO, format!("a bug in vmafx-bypass: {text}"));
        // Dropping what somebody has panicked with may panic.
        std::mem::forget(payload);
        failure
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let errno = error
            .raw_os_error()
            .map_or_else(|| by_kind(error.kind()), Errno::from_raw);
        Self::new(errno, error.to_string())
    }
}

/// Of errors that are the library's own, which have no number.
fn by_kind(kind: io::ErrorKind) -> Errno {
    match kind {
        io::ErrorKind::InvalidInput => Errno::EINVAL,
        io::ErrorKind::IsADirectory => Errno::EISDIR,
        io::ErrorKind::PermissionDenied => Errno::EACCES,
        _ => Errno::EIO,
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(Errno::ENODATA, refusal.to_string())
    }
}

thread_local! {
    static LAST: RefCell<(i32, CString)> = RefCell::default();
}

/// Does what a call is for, and answers `failed` where it cannot: after an error,
/// or after a panic, which must not unwind into C.
pub(crate) fn call<T>(failed: T, body: impl FnOnce() -> Result<T, Failure>) -> T {
    // Handles stay sound after a panic: what threads share of them is atomics,
    // and mutexes whose poison the library handles.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(payload) => Failure::of_panic(payload),
    };
    let mut message = failure.message.into_bytes();
    message.retain(|&byte| byte != 0);
    let message = CString::new(message).unwrap_or_default();
    let errno = failure.errno as i32;
    // A thread that ends may have lost its message already: errno is left to it.
    let _ = LAST.try_with(|last| last.replace((errno, message)));
    // At last: freeing the message before may have changed it.
    failure.errno.set();
    failed
}

/// The thread's last message; stays until its next failure.
pub(crate) fn last_message() -> *const c_char {
    LAST.try_with(|last| last.borrow().1.as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The thread's last errno; 0: none yet.
pub(crate) fn last_errno() -> i32 {
    LAST.try_with(|last| last.borrow().0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        LAST.with(|last| last.borrow().1.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_panic_is_an_error_and_no_unwinding() {
        assert_eq!((last_errno(), message()), (0, String::new()));
        assert_eq!(call(-1, || panic!("at {}", 7)), -1);
        assert_eq!(Errno::last(), Errno::EIO);
        assert_eq!(last_errno(), Errno::EIO as i32);
        assert_eq!(message(), "a bug in vmafx-bypass: at 7");
        assert_eq!(call(-1, || Ok(3)), 3);
        assert_eq!(message(), "a bug in vmafx-bypass: at 7");
    }

    #[test]
    fn errors_of_other_threads_are_theirs() {
        let fail = || call(0, || Err(Failure::invalid("with a \0 in it")));
        std::thread::spawn(move || {
            assert_eq!(fail(), 0);
            assert_eq!(message(), "with a  in it");
        })
        .join()
        .unwrap();
        assert_eq!((last_errno(), message()), (0, String::new()));
    }

    #[test]
    fn errors_keep_their_number() {
        let number = |error: io::Error| Failure::from(error).errno;
        let missing = std::fs::File::open("/no/such/file").unwrap_err();
        assert_eq!(number(missing), Errno::ENOENT);
        assert_eq!(number(io::ErrorKind::IsADirectory.into()), Errno::EISDIR);
        assert_eq!(number(io::ErrorKind::UnexpectedEof.into()), Errno::EIO);
    }
}
