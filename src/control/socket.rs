//! The socket's place, for the broker and for `leveret ctl`.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// The socket in the data directory.
pub const NAME: &str = "control.sock";

/// Bytes of a socket's path that the system takes (`sun_path`, without its final zero).
const MAX_PATH_BYTES: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Opens the socket of a data directory, which nobody else may have open; it does not block.
///
/// # Errors
/// When the file system does not have sockets, or something else has the name.
pub fn bind(directory: &Path) -> io::Result<UnixListener> {
    let path = directory.join(NAME);
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(&path)?,
        Ok(_) => {
            let text = format!("'{}' is there, and is not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Before there is anything to connect to: Linux gives the file the socket's own mode.
    fchmod(&socket, Mode::from_raw_mode(0o600))?;
    with_short_path(directory, |path| socket.bind(&SockAddr::unix(path)?))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Connects to the broker that has the data directory open.
///
/// # Errors
/// Not found or refused when there is none; no permission when it is another user's.
pub fn connect(directory: &Path) -> io::Result<UnixStream> {
    with_short_path(directory, |path| UnixStream::connect(path))
}

/// Removes the socket.
pub fn remove(directory: &Path) {
    if let Err(error) = fs::remove_file(directory.join(NAME)) {
        tracing::debug!(%error, "the control socket cannot be removed");
    }
}

/// Calls `work` with a path of the socket that is short enough. A long one goes through the open directory.
fn with_short_path<T>(directory: &Path, work: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let path = directory.join(NAME);
    if path.as_os_str().len() <= MAX_PATH_BYTES {
        return work(&path);
    }
    let open = File::open(directory)?;
    let descriptors = Path::new("/proc/self/fd");
    if !descriptors.exists() {
        let text =
            format!("the path '{}' is too long for a socket, and there is no /proc to shorten it", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let short: PathBuf = descriptors.join(open.as_raw_fd().to_string()).join(NAME);
    work(&short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_is_no_hindrance() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120)).join("e".repeat(120));
        fs::create_dir_all(&deep).unwrap();
        let listener = bind(&deep).unwrap();
        let _client = connect(&deep).unwrap();
        listener.accept().unwrap();
        assert!(deep.join(NAME).exists());
        remove(&deep);
        assert!(!deep.join(NAME).exists());
    }

    #[test]
    fn the_socket_is_for_one_user_and_replaces_a_stale_one_but_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        drop(bind(directory.path()).unwrap());
        assert_eq!(connect(directory.path()).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let _listener = bind(directory.path()).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        connect(directory.path()).unwrap();
        remove(directory.path());
        fs::write(&path, b"something else").unwrap();
        assert_eq!(bind(directory.path()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"something else");
    }
}
