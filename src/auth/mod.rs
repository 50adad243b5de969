//! Who may log in, and what they may do once they are in.
//!
//! # Ownership
//! One [`Authenticator`] per broker holds every [`User`] behind one lock that is held only to look up or to
//! replace. A [`User`] never changes: a change puts a new one in its place and moves the
//! [epoch](Authenticator::epoch) on, so whoever kept an answer (a channel's permission cache) asks again
//! when the epoch it kept differs.
//!
//! # Invariants
//! - A blank password never logs in, not even where one is stored.
//! - A loopback user logs in from this machine only; the client cannot tell that refusal from a wrong password.
//! - No tag grants access: a user without a permission record in a vhost is refused there.
//!
//! # Elsewhere
//! Turning a refusal into a reply code, and the pause after a refused login: `session`. Which operation needs
//! which [`Access`]: `session`, at the method in question.

mod authenticator;
mod password;
mod permission;
pub mod sasl;

pub use authenticator::{AuthFailure, Authenticator, NoSuchUser, User};
pub use password::{HashAlgorithm, PasswordHash, PasswordHashError};
pub use permission::{Access, InvalidPattern, Pattern, Permission, Refusal, Resource};
