//! The users of this broker, and the two questions about them: may they log in, and what may they do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::password::PasswordHash;
use super::permission::{Access, Permission, Refusal, Resource, permission_name};

/// The tag that lets a user publish under another user's id.
const IMPERSONATOR: &str = "impersonator";

/// A user as it was at one moment; never changed, only replaced.
#[derive(Clone, Debug)]
pub struct User {
    pub name: String,
    /// `None`: the user cannot log in with a password.
    pub password: Option<PasswordHash>,
    pub tags: Vec<String>,
    /// By vhost. A record grants entry to the vhost, even if all its patterns are empty.
    pub permissions: BTreeMap<String, Arc<Permission>>,
}

impl User {
    /// A user with a password, without tags and without permissions.
    #[must_use]
    pub fn new(name: impl Into<String>, password: PasswordHash) -> Self {
        Self { name: name.into(), password: Some(password), tags: Vec::new(), permissions: BTreeMap::new() }
    }

    #[must_use]
    pub fn with_tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.push(tag.into());
        self
    }

    #[must_use]
    pub fn with_permission(mut self, vhost: impl Into<String>, permission: Permission) -> Self {
        self.permissions.insert(vhost.into(), Arc::new(permission));
        self
    }

    #[must_use]
    pub fn has_tag(&self, tag: &str) -> bool {
        self.tags.iter().any(|own| own == tag)
    }

    /// Whether the `user-id` property of this user's messages may name somebody else.
    #[must_use]
    pub fn may_impersonate(&self) -> bool {
        self.has_tag(IMPERSONATOR)
    }
}

/// Why a login was refused. For the log: the client is told the same text in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthFailure {
    #[error("invalid credentials")]
    UnknownUser,
    #[error("invalid credentials")]
    WrongPassword,
    #[error("blank passwords are not accepted")]
    BlankPassword,
    #[error("user can only connect via localhost")]
    NotLoopback,
}

/// A change to a user that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no user '{user}'")]
pub struct NoSuchUser {
    pub user: String,
}

/// All users, shared by every connection.
#[derive(Debug)]
pub struct Authenticator {
    users: RwLock<HashMap<String, Arc<User>>>,
    loopback_users: BTreeSet<String>,
    epoch: AtomicU64,
    /// Checked in place of an unknown user's, so that the time taken does not tell who exists.
    decoy: PasswordHash,
}

impl Authenticator {
    #[must_use]
    pub fn new(users: impl IntoIterator<Item = User>, loopback_users: impl IntoIterator<Item = String>) -> Self {
        let users = users.into_iter().map(|user| (user.name.clone(), Arc::new(user))).collect();
        Self {
            users: RwLock::new(users),
            loopback_users: loopback_users.into_iter().collect(),
            epoch: AtomicU64::new(0),
            decoy: PasswordHash::new("decoy"),
        }
    }

    /// Checks a login from `peer`, the address at the other end of the socket.
    ///
    /// # Errors
    /// [`AuthFailure`] with the true reason. Log it; do not send it.
    pub fn authenticate(&self, user: &str, password: &[u8], peer: IpAddr) -> Result<Arc<User>, AuthFailure> {
        if password.is_empty() {
            return Err(AuthFailure::BlankPassword);
        }
        let found = self.user(user);
        let hash = found.as_ref().and_then(|user| user.password.as_ref());
        let matches = hash.unwrap_or(&self.decoy).matches(password);
        let Some(found) = found else {
            return Err(AuthFailure::UnknownUser);
        };
        if !matches || found.password.is_none() {
            return Err(AuthFailure::WrongPassword);
        }
        if self.loopback_users.contains(user) && !peer.to_canonical().is_loopback() {
            return Err(AuthFailure::NotLoopback);
        }
        Ok(found)
    }

    /// The user as it is now.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<Arc<User>> {
        self.users.read().get(name).cloned()
    }

    /// All users, by name.
    #[must_use]
    pub fn users(&self) -> Vec<Arc<User>> {
        let mut users: Vec<_> = self.users.read().values().cloned().collect();
        users.sort_by(|a, b| a.name.cmp(&b.name));
        users
    }

    /// Whether the user may enter the vhost: it has a permission record there, whatever the record says.
    #[must_use]
    pub fn vhost_access(&self, user: &str, vhost: &str) -> bool {
        self.permission(user, vhost).is_some()
    }

    /// What the user may do in the vhost. Valid until [`epoch`](Self::epoch) moves on.
    #[must_use]
    pub fn permission(&self, user: &str, vhost: &str) -> Option<Arc<Permission>> {
        self.users.read().get(user)?.permissions.get(vhost).cloned()
    }

    /// Checks one operation.
    ///
    /// # Errors
    /// [`Refusal`], whose text is the one that clients know.
    pub fn check(
        &self,
        user: &str,
        vhost: &str,
        access: Access,
        resource: Resource,
        name: &str,
    ) -> Result<(), Refusal> {
        match self.permission(user, vhost) {
            Some(permission) if permission.allows(access, resource, name) => Ok(()),
            _ => Err(Refusal {
                access,
                resource,
                name: permission_name(resource, name).to_owned(),
                vhost: vhost.to_owned(),
                user: user.to_owned(),
            }),
        }
    }

    /// Moves on with every change of a user or a permission. Read it *before* the answer that is to be cached:
    /// a change in between then makes the cached answer old, never the other way round.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Adds a user or replaces the one of this name.
    pub fn put_user(&self, user: User) {
        let mut users = self.users.write();
        users.insert(user.name.clone(), Arc::new(user));
        self.advance_epoch();
    }

    /// Removes a user and returns what it was. Its connections are the caller's to close.
    pub fn remove_user(&self, name: &str) -> Option<Arc<User>> {
        let mut users = self.users.write();
        let removed = users.remove(name);
        self.advance_epoch();
        removed
    }

    /// Sets what a user may do in a vhost; `None` takes away its access.
    ///
    /// # Errors
    /// [`NoSuchUser`]; nothing is changed then.
    pub fn set_permission(&self, user: &str, vhost: &str, permission: Option<Permission>) -> Result<(), NoSuchUser> {
        let mut users = self.users.write();
        let entry = users.get_mut(user).ok_or_else(|| NoSuchUser { user: user.to_owned() })?;
        let changed = Arc::make_mut(entry);
        match permission {
            Some(permission) => changed.permissions.insert(vhost.to_owned(), Arc::new(permission)),
            None => changed.permissions.remove(vhost),
        };
        self.advance_epoch();
        Ok(())
    }

    /// Called with the users still locked: whoever sees the new epoch sees the change.
    fn advance_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::permission::Pattern;
    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn authenticator() -> Authenticator {
        let guest = User::new("guest", PasswordHash::new("guest"))
            .with_tag("administrator")
            .with_permission("/", Permission::full());
        let app = User::new("app", PasswordHash::new("secret")).with_permission(
            "/",
            Permission { configure: Pattern::new(""), write: Pattern::new("^orders$"), read: Pattern::new("") },
        );
        Authenticator::new([guest, app], ["guest".to_owned()])
    }

    fn login(user: &str, password: &str, peer: &str) -> Result<String, AuthFailure> {
        authenticator().authenticate(user, password.as_bytes(), peer.parse().unwrap()).map(|user| user.name.clone())
    }

    #[test]
    fn the_right_password_logs_in_and_a_wrong_one_does_not() {
        assert_eq!(login("app", "secret", "10.0.0.7"), Ok("app".to_owned()));
        assert_eq!(login("app", "Secret", "10.0.0.7"), Err(AuthFailure::WrongPassword));
        assert_eq!(login("nobody", "secret", "10.0.0.7"), Err(AuthFailure::UnknownUser));
        assert_eq!(login("nobody", "decoy", "10.0.0.7"), Err(AuthFailure::UnknownUser));
    }

    #[test]
    fn blank_passwords_are_refused_whoever_asks() {
        let blank = Authenticator::new([User::new("blank", PasswordHash::new(""))], []);
        let failure = blank.authenticate("blank", b"", LOCAL).unwrap_err();
        assert_eq!(failure, AuthFailure::BlankPassword);
    }

    #[test]
    fn a_user_without_password_cannot_log_in_with_the_decoy() {
        let mut user = User::new("cert", PasswordHash::new("x"));
        user.password = None;
        let authenticator = Authenticator::new([user], []);
        let failure = authenticator.authenticate("cert", b"decoy", LOCAL).unwrap_err();
        assert_eq!(failure, AuthFailure::WrongPassword);
    }

    #[test]
    fn loopback_users_log_in_from_this_machine_only() {
        for peer in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            assert!(login("guest", "guest", peer).is_ok(), "{peer}");
        }
        for peer in ["10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1"] {
            assert_eq!(login("guest", "guest", peer), Err(AuthFailure::NotLoopback), "{peer}");
        }
    }

    #[test]
    fn vhost_access_needs_a_permission_record_whatever_the_tags() {
        let authenticator = authenticator();
        assert!(authenticator.vhost_access("guest", "/"));
        assert!(!authenticator.vhost_access("guest", "other"));
        assert!(!authenticator.vhost_access("nobody", "/"));
        authenticator
            .set_permission(
                "guest",
                "other",
                Some(Permission { configure: Pattern::new(""), write: Pattern::new(""), read: Pattern::new("") }),
            )
            .unwrap();
        assert!(authenticator.vhost_access("guest", "other"));
    }

    #[test]
    fn refusals_have_the_text_that_clients_know() {
        let authenticator = authenticator();
        let refusal = |access, resource, name| {
            let result = authenticator.check("app", "/", access, resource, name);
            result.map_err(|refusal| refusal.to_string())
        };
        assert_eq!(refusal(Access::Write, Resource::Exchange, "orders"), Ok(()));
        assert_eq!(
            refusal(Access::Configure, Resource::Queue, "jobs").unwrap_err(),
            "configure access to queue 'jobs' in vhost '/' refused for user 'app'"
        );
        assert_eq!(
            refusal(Access::Write, Resource::Exchange, "").unwrap_err(),
            "write access to exchange 'amq.default' in vhost '/' refused for user 'app'"
        );
    }

    #[test]
    fn every_change_moves_the_epoch_on() {
        let authenticator = authenticator();
        let mut last = authenticator.epoch();
        let mut moved = || {
            let before = std::mem::replace(&mut last, authenticator.epoch());
            last > before
        };
        authenticator.put_user(User::new("new", PasswordHash::new("n")));
        assert!(moved());
        authenticator.set_permission("new", "/", Some(Permission::full())).unwrap();
        assert!(moved() && authenticator.vhost_access("new", "/"));
        authenticator.set_permission("new", "/", None).unwrap();
        assert!(moved() && !authenticator.vhost_access("new", "/"));
        assert!(authenticator.remove_user("new").is_some() && authenticator.user("new").is_none());
        assert!(moved() && authenticator.users().len() == 2);
        assert_eq!(authenticator.set_permission("new", "/", None).unwrap_err().to_string(), "no user 'new'");
        assert!(!moved());
    }

    #[test]
    fn a_logged_in_user_keeps_what_it_was_when_it_is_replaced() {
        let authenticator = authenticator();
        let before = authenticator.authenticate("app", b"secret", LOCAL).unwrap();
        authenticator.put_user(User::new("app", PasswordHash::new("other")).with_tag(IMPERSONATOR));
        assert!(!before.may_impersonate());
        assert!(authenticator.user("app").unwrap().may_impersonate());
    }
}
