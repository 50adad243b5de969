//! A connection's writer task: takes what the outbox has gathered and writes it, as much as there is at a time.

use std::{io, sync::Arc, time::Duration};

use tokio::{net::tcp::OwnedWriteHalf, time::timeout};

use super::registry::{Command, Handle};
use crate::session::{WriteBuffer, WriteCursor};

/// Silence after which a connection gives its buffers' memory back.
const IDLE: Duration = Duration::from_secs(1);

/// Writes until the outbox is closed, or finished and empty.
pub async fn write_loop(socket: Arc<OwnedWriteHalf>, handle: Arc<Handle>) {
    let outbox = handle.outbox.clone();
    let mut batch = WriteBuffer::default();
    loop {
        while outbox.take(&mut batch) {
            if let Err(error) = write_all(&socket, &batch).await {
                tracing::debug!(connection = handle.id, %error, "write failed");
                outbox.close();
                handle.command(Command::Drop("write failed"));
                return;
            }
            handle.note_sent();
            outbox.recycle(&mut batch);
            outbox.refill();
        }
        if outbox.is_closed() || outbox.is_finished() {
            return;
        }
        if timeout(IDLE, outbox.writable()).await.is_err() {
            outbox.rest(&mut batch);
            outbox.writable().await;
        }
    }
}

async fn write_all(socket: &OwnedWriteHalf, batch: &WriteBuffer) -> io::Result<()> {
    let mut cursor = WriteCursor::default();
    loop {
        match cursor.slices(batch, |slices| socket.try_write_vectored(slices)) {
            None => return Ok(()),
            Some(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Some(Ok(written)) => cursor.advance(batch, written),
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Some(Err(error)) => return Err(error),
        }
    }
}
