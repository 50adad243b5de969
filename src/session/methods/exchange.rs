//! Class exchange.

use amq_protocol::protocol::{AMQPClass, exchange};
use amq_protocol::types::FieldTable;

use crate::{
    auth::{Access, Resource},
    broker::{
        binding::{Binding, Destination},
        exchange::{Exchange, ExchangeKind, ExchangeOptions},
        router::{Declared, TopologyError, check_deletable, check_ends, check_not_default},
    },
    model::strip_cr_lf,
    session::{
        close::Fault,
        connection::{Answer, Session},
    },
};

impl Session {
    pub(super) fn on_exchange(&mut self, method: exchange::AMQPMethod) -> Result<Answer, Fault> {
        use exchange::AMQPMethod as X;
        match method {
            X::Declare(declare) if declare.passive => self.exchange_declare_passive(&declare),
            X::Declare(declare) => self.exchange_declare(declare),
            X::Delete(delete) => self.exchange_delete(&delete),
            X::Bind(bind) => {
                let answer = (!bind.nowait).then_some(AMQPClass::Exchange(X::BindOk(exchange::BindOk {})));
                let binding = exchange_binding(
                    bind.source.as_str(),
                    bind.destination.as_str(),
                    bind.routing_key.as_str(),
                    bind.arguments,
                );
                self.bind(binding, answer)
            }
            X::Unbind(unbind) => {
                let answer = (!unbind.nowait).then_some(AMQPClass::Exchange(X::UnbindOk(exchange::UnbindOk {})));
                let binding = exchange_binding(
                    unbind.source.as_str(),
                    unbind.destination.as_str(),
                    unbind.routing_key.as_str(),
                    unbind.arguments,
                );
                self.unbind(&binding, answer)
            }
            _ => Err(Fault::new(503, "unimplemented method")),
        }
    }

    fn exchange_declare_passive(&mut self, declare: &exchange::Declare) -> Result<Answer, Fault> {
        let name = strip_cr_lf(declare.exchange.as_str());
        check_not_default(&name)?;
        self.check_any(Resource::Exchange, &name)?;
        if let Some(vhost) = &self.vhost {
            vhost.declare_exchange_passive(&name)?;
        }
        Ok(super::unless(declare.nowait, declare_ok()))
    }

    fn exchange_declare(&mut self, declare: exchange::Declare) -> Result<Answer, Fault> {
        let name = strip_cr_lf(declare.exchange.as_str()).into_owned();
        let kind =
            ExchangeKind::parse(declare.kind.as_str()).map_err(|error| Fault::from(TopologyError::from(error)))?;
        check_not_default(&name)?;
        self.check(Access::Configure, Resource::Exchange, &name)?;
        let options =
            ExchangeOptions { durable: declare.durable, auto_delete: declare.auto_delete, internal: declare.internal };
        let exchange = Exchange::new(name.as_str().into(), kind, options, declare.arguments);
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        if vhost.check_declare_exchange(&exchange)? == Declared::Created
            && let Some(alternate) = &exchange.alternate
        {
            self.check(Access::Read, Resource::Exchange, &name)?;
            self.check(Access::Write, Resource::Exchange, alternate)?;
        }
        let round = vhost.declare_exchange(exchange, self.id)?;
        Ok(Answer::After(round, (!declare.nowait).then(declare_ok)))
    }

    fn exchange_delete(&mut self, delete: &exchange::Delete) -> Result<Answer, Fault> {
        let name = strip_cr_lf(delete.exchange.as_str());
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        check_deletable(&name, &vhost.name)?;
        self.check(Access::Configure, Resource::Exchange, &name)?;
        let round = vhost.delete_exchange(&name, delete.if_unused, self.id)?;
        let answer = AMQPClass::Exchange(exchange::AMQPMethod::DeleteOk(exchange::DeleteOk {}));
        Ok(Answer::After(round, (!delete.nowait).then_some(answer)))
    }

    fn check_binding(&self, binding: &Binding) -> Result<(), Fault> {
        let resource = match binding.destination {
            Destination::Queue(_) => Resource::Queue,
            Destination::Exchange(_) => Resource::Exchange,
        };
        self.check(Access::Write, resource, binding.destination.name())?;
        check_ends(binding)?;
        self.check(Access::Read, Resource::Exchange, &binding.source)
    }

    pub(super) fn bind(&mut self, binding: Binding, answer: Option<AMQPClass>) -> Result<Answer, Fault> {
        self.check_binding(&binding)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        let round = vhost.bind(binding, self.id, &mut self.effects)?;
        Ok(Answer::After(round, answer))
    }

    pub(super) fn unbind(&mut self, binding: &Binding, answer: Option<AMQPClass>) -> Result<Answer, Fault> {
        self.check_binding(binding)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        let round = vhost.unbind(binding, self.id)?;
        Ok(Answer::After(round, answer))
    }
}

fn declare_ok() -> AMQPClass {
    AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(exchange::DeclareOk {}))
}

fn exchange_binding(source: &str, destination: &str, key: &str, arguments: FieldTable) -> Binding {
    Binding {
        source: strip_cr_lf(source).into(),
        destination: Destination::Exchange(strip_cr_lf(destination).into()),
        key: key.into(),
        arguments,
    }
}
